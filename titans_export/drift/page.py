"""The report as one self-contained page: verdict, plots, numbers and provenance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from . import plots
from .plots import Line

Json = dict[str, Any]

_STYLE = """
:root { --ink: #1a1c1e; --soft: #5c6166; --paper: #ffffff; --card: #f6f7f8; --grid: #d5d8db; --limit: #b00020;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #b5598c; --series-4: #b37700;
  --series-5: #2f8fc4; --good: #0b6e4f; --bad: #b00020; --open: #5c6166; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3a9af; --paper: #15171a; --card: #1e2125;
  --grid: #3b4046; --limit: #ff8a80; --series-0: #6cb8ec; --series-1: #ff9248; --series-2: #3ecf9f; --series-3: #e9a5cb;
  --series-4: #f0b83f; --series-5: #9bd4f5; --good: #3ecf9f; --bad: #ff8a80; --open: #a3a9af; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.35rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 12px; }
p { margin: 0 0 12px; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.verdict { border-left: 6px solid var(--open); background: var(--card); padding: 14px 18px; margin: 18px 0;
  font-size: 1.1rem; border-radius: 0 8px 8px 0; }
.verdict b { display: block; } .good { border-color: var(--good); } .good b { color: var(--good); }
.bad { border-color: var(--bad); } .bad b { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 0.8125rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: 0.8125rem; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px; }
figure { margin: 0; min-width: 0; } figure h3 { font-size: 1rem; margin: 0 0 2px; }
figure svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif; }
.scroll { overflow-x: auto; } .scroll { margin-bottom: 18px; } details { margin: 8px 0; } summary { cursor: pointer; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.names td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.names td:first-child { overflow-wrap: normal; min-width: 6.5em; } 
.names th { text-align: left; white-space: normal; vertical-align: top; }
"""


def render(report: Json) -> str:
    """The page of a report from `Report.to_json`."""
    report = _showable(report)
    title = f"Drift of {_name(report, 'bundle')} from {_name(report, 'reference')}"
    given = report["tolerance"] is not None or report["bits_tolerance"] is not None
    state = ("good" if report["passed"] else "bad") if given else "open"
    word = {"good": "✓ Within tolerance", "bad": "✗ Not within tolerance", "open": "No tolerance given"}[state]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(report))}</p>',
        f'<div class="verdict {state}"><b>{word}</b>{escape(_sentence(report))}</div>',
        _tiles(report),
        f'<h2>Along the stream</h2><div class="plots">{"".join(_stream_plots(report))}</div>',
        *_inside(report),
        "<h2>Numbers</h2>",
        *_tables(report),
        "<h2>Provenance</h2>",
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _sentence(report: Json) -> str:
    """The verdict without its heading."""
    verdict: str = report["verdict"]
    for start in ("Within tolerance: ", "Not within tolerance: ", "No tolerance was given. "):
        if verdict.startswith(start):
            rest = verdict[len(start) :]
            return rest[:1].upper() + rest[1:]
    return verdict


def _showable(value: Any) -> Any:
    """The value with U+FFFD for bytes of file names that are not UTF-8."""
    if isinstance(value, dict):
        return {key: _showable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_showable(inner) for inner in value]
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


def _name(report: Json, side: str) -> str:
    """The bundle's name, and where it ran if only that differs."""
    entry, other = (report["bundles"][key] for key in ("bundle", "reference"))
    own = entry if side == "bundle" else other
    differing = [key for key in ("device", "backend", "engine", "memory_kernel") if entry[key] != other[key]]
    same = entry["manifest_xxh3_128"] == other["manifest_xxh3_128"]
    details = f" ({', '.join(str(own[key]) for key in differing)})" if same and differing else ""
    recipe = f" ({own['recipe']})" if own["recipe"] else ""
    return f"{own['name']}{recipe}{details}"


def _subtitle(report: Json) -> str:
    unit = "vectors" if report["bits_per_token"] is None and report["kl_bits"] is None else "tokens"
    fresh = f", a fresh stream every {report['stream_length']:,}" if report["stream_length"] else ""
    fed = f"{report['positions']:,} {unit} of {report['stream']}{fresh}"
    return f"{fed}; windows of {report['window']:,}; {report['date']}"


def _tiles(report: Json) -> str:
    found: list[tuple[str, str, str]] = []
    bits, unit = _bits(report)
    if bits is not None:
        reference, own = _number(bits["reference"], 4), _number(bits["bundle"], 4)
        found.append((f"Bits per {unit}", _percent(bits["difference"]), f"{reference} → {own}"))
    if report["kl_bits"] is not None:
        largest = f"maximum {_number(report['kl_bits']['max'])}"
        found.append(("KL, bits per token", _number(report["kl_bits"]["mean"]), largest))
    what = "output" if bits is None else "logit"
    mean = f"mean {_number(report['mean_abs_error'])}"
    found.append((f"Maximum {what} error", _number(report["max_abs_error"]), mean))
    if report["top1_agreement"] is not None:
        found.append(("Top-1 agreement", f"{report['top1_agreement']:.2%}", "of positions"))
    last = _last_memory(report)
    if last:
        worst = max(last, key=lambda entry: _order(entry["weights"]))
        found.append(("Memory at the end, W", _number(worst["weights"]), f"relative, {worst['layer']}"))
    if report["recall"] is not None and report["recall"]["distances"]:
        far, task = report["recall"]["distances"][-1], report["recall"]["task"]
        values = [
            f"{far[key]:.0%}" if task == "pairs" else f"{_number(far[key])} bits" for key in ("bundle", "reference")
        ]
        name = f"Recall over {far['distance']:,} tokens"
        found.append((name, values[0], f"reference {values[1]}"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def _stream_plots(report: Json) -> Iterable[str]:
    windows, (bits, unit) = report["windows"], _bits(report)
    ends = [window["end"] for window in windows]
    names = _short_names(report)
    if not windows:
        return
    if bits is not None:
        per_byte = (
            bits["reference"] / report["bits_per_token"]["reference"] if report["bits_per_token"]["reference"] else 1.0
        )
        series = [Line(names[1], [_times(window["reference_bits"], per_byte) for window in windows]),
                  Line(names[0], [_times(window["bits"], per_byte) for window in windows])]  # fmt: skip
        alt = f"Bits per {unit} by position: {_span(series[0])} for {names[1]}, {_span(series[1])} for {names[0]}"
        yield _figure(f"Bits per {unit}", plots.lines(alt, ends, series, x="position", y=f"bits per {unit}"),
                      "Cost of a token given all tokens before it, mean over a window. Lower is better.")  # fmt: skip
        line = Line("difference", [_times(window["bits_difference"], 100) for window in windows])
        limit = report["bits_tolerance"]
        alt = f"Increase of the bits in percent, by position: {_span(line)}" + _limit_text(limit, " percent")
        yield _figure("Increase of the bits", plots.lines(alt, ends, [line], x="position", y="increase", limit=limit,
                      percent=True), "Above zero, the bundle predicts worse than the reference.")  # fmt: skip
        series = [Line("maximum", [window["kl_max"] for window in windows]),
                  Line("mean", [window["kl_mean"] for window in windows])]  # fmt: skip
        alt = f"KL divergence in bits by position: mean {_span(series[1])}, maximum {_span(series[0])}"
        yield _figure("KL divergence", plots.lines(alt, ends, series, x="position", y="bits", log=True),
                      "KL(reference ‖ bundle): extra bits per token if the reference is exact.")  # fmt: skip
    series = [Line("maximum", [window["max_abs_error"] for window in windows]),
              Line("mean", [window["mean_abs_error"] for window in windows])]  # fmt: skip
    what, limit = "outputs" if bits is None else "logits", report["tolerance"]
    alt = f"Absolute error of {what} by position: mean {_span(series[1])}, maximum {_span(series[0])}" + _limit_text(
        limit
    )
    yield _figure(f"Error of the {what}", plots.lines(alt, ends, series, x="position", y="absolute error", log=True,
                  limit=limit), "Maximum and mean over each window.")  # fmt: skip
    for key, letter, text in (("weights", "W", "fast weights"), ("surprise", "S", "accumulated surprise")):
        layers = list(dict.fromkeys(entry["layer"] for entry in report["memory"] if entry[key] is not None))
        places = list(dict.fromkeys(entry["position"] for entry in report["memory"]))
        if not layers:
            continue
        found = {(entry["layer"], entry["position"]): entry[key] for entry in report["memory"]}
        series = [Line(layer, [found.get((layer, place)) for place in places]) for layer in layers]
        alt = f"Distance of the {text} by position: " + "; ".join(f"{line.name} {_span(line)}" for line in series)
        drawn = plots.lines(alt, places, series, x="position", y="relative distance", log=True)
        caption = f"Relative norm of the difference of the {text} at the end of a window, over all heads of a layer."
        yield _figure(f"Memory: distance of {letter}", drawn, caption)


def _inside(report: Json) -> Iterable[str]:
    """Layers and recall, if measured."""
    found = []
    if report["layers"] is not None and report["layers"]["errors"]:
        values = {entry["layer"]: entry["relative_error"] for entry in report["layers"]["errors"]}
        alt = "Relative error by layer: " + "; ".join(f"{name} {_number(value)}" for name, value in values.items())
        note = (
            f"Root mean square over the first {report['layers']['tokens']:,} tokens: of the residual stream after a "
            "layer, and of a memory's retrievals."
        )
        found.append(_figure("Error of the layers", plots.bars(alt, values, x="relative error"), note))
    recall = report["recall"]
    if recall is not None and recall["distances"]:
        names, pairs = _short_names(report), recall["task"] == "pairs"
        places = [entry["distance"] for entry in recall["distances"]]
        factor = 100.0 if pairs else 1.0
        series = [Line(names[1], [_times(entry["reference"], factor) for entry in recall["distances"]]),
                  Line(names[0], [_times(entry["bundle"], factor) for entry in recall["distances"]])]  # fmt: skip
        alt = f"Recall by distance: {_span(series[1])} for {names[0]}, {_span(series[0])} for {names[1]}"
        y = "right answers, %" if pairs else "bits saved per token"
        note = (
            "Pairs of a key and a value, filler, then each key as a question. Chance is 1.6 %."
            if pairs
            else "A random string, text, then the same string: bits per token that the first occurrence saves. "
            "Zero: no recall."
        )
        drawn = plots.lines(alt, places, series, x="tokens in between", y=y, log_x=True, share=pairs)
        found.append(_figure("Recall", drawn, note))
    if found:
        yield f'<h2>Inside the model</h2><div class="plots">{"".join(found)}</div>'
    if report["layers_missing"]:
        yield f'<p class="soft">Layers were not compared: {escape(report["layers_missing"])}</p>'


def _tables(report: Json) -> Iterable[str]:
    last = _last_memory(report)
    if last:
        keys = (
            "weights",
            "reference_weights_norm",
            "weights_norm",
            "surprise",
            "reference_surprise_norm",
            "surprise_norm",
        )
        rows = [[entry["layer"], *(_number(entry[key]) for key in keys)] for entry in last]
        header = ["memory", "distance of W", "‖W‖ reference", "‖W‖", "distance of S", "‖S‖ reference", "‖S‖"]
        yield f"<p>Memories at position {last[0]['position']:,}</p>{_table(header, rows)}"
    if report["layers"] is not None and report["layers"]["errors"]:
        rows = [
            [entry["layer"], entry["what"], _number(entry["relative_error"]), _number(entry["relative_error_last"])]
            for entry in report["layers"]["errors"]
        ]
        yield "<p>Layers</p>" + _table(["layer", "values", "relative error", "in the last tenth"], rows)
    if report["recall"] is not None:
        shown = (lambda v: f"{v:.1%}") if report["recall"]["task"] == "pairs" else _number
        rows = [
            [f"{entry['distance']:,}", shown(entry["reference"]), shown(entry["bundle"]), str(entry["trials"])]
            for entry in report["recall"]["distances"]
        ]
        yield "<p>Recall</p>" + _table(["distance", "reference", "bundle", "trials"], rows)
    columns: list[tuple[str, str, Any]] = [
        ("from", "start", lambda v: f"{v:,}"),
        ("bits per token, reference", "reference_bits", lambda v: _number(v, 4)),
        ("bits per token", "bits", lambda v: _number(v, 4)),
        ("increase", "bits_difference", _percent),
        ("KL", "kl_mean", _number),
        ("maximum KL", "kl_max", _number),
        ("mean error", "mean_abs_error", _number),
        ("maximum error", "max_abs_error", _number),
        ("relative error", "relative_error", _number),
        ("top-1 agreement", "top1_agreement", lambda v: f"{v:.2%}"),
    ]
    windows = report["windows"]
    columns = [column for column in columns if windows and windows[0][column[1]] is not None]
    rows = [[shown(window[key]) for _, key, shown in columns] for window in windows]
    count = f"{len(windows)} window{'' if len(windows) == 1 else 's'}"
    inner = _table([name for name, _, _ in columns], rows)
    yield f"<details><summary>{count}</summary>{inner}</details>"


def _provenance(report: Json) -> str:
    own, reference = report["bundles"]["bundle"], report["bundles"]["reference"]
    names = {
        "name": "bundle",
        "model": "model",
        "recipe": "recipe",
        "memory": "memory",
        "weights_bytes": "bytes of weights",
        "manifest_xxh3_128": "XXH3-128 of the manifest",
        "weights_xxh3_128": "XXH3-128 of the weights",
        "checkpoint_sha256": "SHA-256 of the checkpoint",
        "producer": "exported by",
        "device": "device",
        "backend": "backend",
        "engine": "engine",
        "memory_kernel": "memory kernel",
    }
    rows = [
        [text, _plain(own[key]), _plain(reference[key])] for key, text in names.items() if own[key] or reference[key]
    ]
    sides = _table(["", "bundle", "reference"], rows, "names")
    machine = report["machine"]
    where = (
        f"{machine['cores']} cores of {machine['processor']} ({machine['architecture']}, "
        f"{', '.join(machine['flags'])}), {machine['system']}, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in report["packages"].items())
        + f". Feeding took {report['seconds']['bundle']:,.1f} s and {report['seconds']['reference']:,.1f} s."
    )
    return f'{sides}<p class="soft" style="margin-top:12px">{escape(where)}</p>'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value) if value else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, drawn: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _short_names(report: Json) -> tuple[str, str]:
    """The names of the two in legends."""
    own, reference = _name(report, "bundle"), _name(report, "reference")
    return (own, reference) if own != reference else ("bundle", "reference")


def _bits(report: Json) -> tuple[Json | None, str]:
    if report["bits_per_byte"] is not None:
        return report["bits_per_byte"], "byte"
    return report["bits_per_token"], "token"


def _last_memory(report: Json) -> list[Json]:
    last = max((entry["position"] for entry in report["memory"]), default=None)
    return [entry for entry in report["memory"] if entry["position"] == last]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _order(value: float | None) -> float:
    return math.inf if value is None else value


def _span(line: Line) -> str:
    values = [value for value in line.values if value is not None and math.isfinite(value)]
    if not values:
        return "no numbers"
    low, high = min(values), max(values)
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _limit_text(limit: float | None, unit: str = "") -> str:
    return "" if limit is None else f"; the tolerance is {limit:g}{unit}"


def _number(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if digits:
        return f"{value:.{digits}f}"
    return "0" if value == 0 else f"{value:.2g}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"


def _percent(part: float | None) -> str:
    if part is None or not math.isfinite(part):
        return "not finite"
    return "0 %" if part == 0 else f"{part * 100:+.3f} %" if abs(part) >= 1e-5 else f"{part * 100:+.0e} %"
