"""The page's plots: inline SVG in the page's colours, readable on light and dark backgrounds."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Values = Sequence[float | None]

# These colours are replaced by CSS variables of the page. The series use the palette of Okabe and Ito.
_INK, _GRID = "#101112", "#d0d1d2"
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LIMIT = "#b00020"
VARIABLES = {_INK: "ink", _GRID: "grid", _LIMIT: "limit"} | {value: f"series-{i}" for i, value in enumerate(_SERIES)}
_DASHES = ("-", "--", ":", "-.")
_FEW = 24  # up to this many points have markers


@dataclass(frozen=True)
class Line:
    """A line of a plot: its name and one value per place, None for a gap."""

    name: str
    values: Values


def lines(
    alt: str,
    places: Sequence[float],
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    limit: float | None = None,
    percent: bool = False,
    share: bool = False,
) -> str:
    """Lines over places. `log`: logarithmic axis, linear without positive values. `limit`: a line for the tolerance.

    `share`: the axis goes from 0 to 100.
    """
    from matplotlib import ticker

    figure, axes = _figure(x, y)
    shown = [[_drawable(value, log) for value in line.values] for line in series]
    positive = any(value > 0 for values in shown for value in values if not math.isnan(value))
    for i, (line, values) in enumerate(zip(series, shown, strict=True)):
        marker = "o" if len(places) <= _FEW else None
        style = _DASHES[i % len(_DASHES)] if i < len(_SERIES) else _DASHES[(i + 1) % len(_DASHES)]
        label = _label(line.name) if len(series) > 1 else None
        axes.plot(places, values, style, color=_SERIES[i % len(_SERIES)], marker=marker, markersize=4, label=label)
    if limit is not None:
        axes.axhline(limit, color=_LIMIT, linestyle=(0, (6, 3)), linewidth=1.2, label="tolerance")
    if log and positive:
        _logarithmic(axes, [value for values in shown for value in values if not math.isnan(value)], limit)
    elif percent:
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.axhline(0, color=_INK, linewidth=0.8)
    if share:
        axes.set_ylim(0, 104)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(places), [f"{int(place):,}" for place in places])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    if len(series) > 1 or limit is not None:
        figure.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="outside upper left", ncols=3)
    return _svg(figure, alt)


def bars(alt: str, values: Mapping[str, float], *, x: str) -> str:
    """One bar per name, from the top."""
    names = list(values)
    shown = [_drawable(value, False) for value in values.values()]
    figure, axes = _figure(x, "", height=max(1.6, 0.9 + 0.3 * len(names)))
    axes.barh(range(len(names)), shown, color=_SERIES[0], height=0.7)
    axes.set_yticks(range(len(names)), list(map(_label, names)))
    axes.invert_yaxis()
    axes.set_xlim(0, max([value for value in shown if not math.isnan(value)], default=1) * 1.3 or 1)
    for at, value in enumerate(shown):
        text = "not finite" if math.isnan(value) else f"{value:.1e}" if value else "0"
        axes.text(0 if math.isnan(value) else value, at, f" {text}", va="center", fontsize=9, color=_INK)
    axes.locator_params(axis="x", nbins=4)
    return _svg(figure, alt)


def _label(name: str) -> str:
    """The name for matplotlib, which reads formulas between dollars and hides lines that begin with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _logarithmic(axes: Any, values: Sequence[float], limit: float | None) -> None:
    """A logarithmic axis with readable labels, also for values within one decade."""
    from matplotlib import ticker

    axes.set_yscale("log")
    inside = [*values, *([limit] if limit else [])]
    if max(inside) / min(inside) < 10:
        plain = ticker.FuncFormatter(lambda value, _: f"{value:.2g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(plain)


def _drawable(value: float | None, log: bool) -> float:
    """The value, or NaN, a gap, if it cannot be drawn."""
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return math.nan
    return value


def _figure(x: str, y: str, height: float = 2.9) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10.5, "axes.formatter.useoffset": False}):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x, color=_INK)
        axes.set_ylabel(y, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.tick_params(colors=_INK, which="both")
    axes.tick_params(color=_GRID, which="both")
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, alt: str) -> str:
    """The figure as an SVG element without a size, in the page's colours and without external references."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt, "path.simplify": False}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    # Identifiers must be unique on a page with several plots.
    own = f"p{abs(hash_of(alt)):x}-"
    body = re.sub(r'\bid="([^"]+)"', rf'id="{own}\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    # matplotlib leaves text without a colour, which is black.
    body = body.replace('<text style="', '<text style="fill: var(--ink); ') if "fill" not in body else body
    return f'<svg {view[0]} role="img" aria-label="{escape(alt, quote=True)}"><title>{escape(alt)}</title>{body}'


def hash_of(text: str) -> int:
    """A hash that is the same in every run."""
    import zlib

    return zlib.crc32(text.encode())
