"""Draws the plot of docs/benchmarks.md from the newest layer result: ratios, and shares of the machine's limits.

python -m benchmarks.plot
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.report import RESULTS, ROOT
from benchmarks.table import newest

PICTURE = ROOT / "docs" / "benchmarks.svg"
COLOURS = ("#1b6ca8", "#76b5e4", "#e08214", "#b2182b", "#7b3294", "#777777")
BAR = 0.8  # share of a row's height


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the result of a layer benchmark as SVG. Equal numbers give equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "titans", "svg.fonttype": "path", "font.size": 9}
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["ratios"]]
    names = list(dict.fromkeys(entry["name"] for row in rows for entry in row["baselines"] if "speed" in entry))
    colours = dict(zip(names, COLOURS, strict=False))
    ratios = {name: [row["ratios"].get(name) for row in rows] for name in names[1:]}
    same = [name for name in names if any(_share(row, name) for row in rows)]
    shares = {name: [_share(row, name) for row in rows] for name in same}

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.9 + 1.05 * len(rows)), sharey=True)
    _bars(left, ratios, colours, lambda value: f"{value:.2f}", 1)
    left.set_title(f"speed-up of {names[0]} over ...")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.invert_yaxis()
    _bars(right, shares, colours, lambda value: f"{value:.0%}", 0)
    right.set_title("share of the machine's limit\n(sgemm for prefill, reading for decode)")
    right.set_xlim(0, 1.12)
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlim(right=left.get_xlim()[1] * 1.6)
    labels = {name: name if name in same else f"{name} (different update)" for name in names}
    handles = [matplotlib.patches.Patch(color=colours[name], label=labels[name]) for name in names]
    figure.legend(handles=handles, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _share(row: dict[str, Any], name: str) -> float | None:
    """The share of the row's limit; None without a speed or for different mathematics."""
    found = (e for e in row["baselines"] if e["name"] == name and "speed" in e and e["same_mathematics"])
    return next((entry["share_of_limit"] for entry in found), None)


def _bars(
    axes: Any,
    series: dict[str, list[float | None]],
    colours: dict[str, str],
    label: Callable[[float], str],
    start: float,
) -> None:
    """Groups of horizontal bars, one group per row and one bar per series, starting at `start`."""
    height = BAR / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        for row, value in enumerate(values):
            if value is None:
                continue
            place = row - BAR / 2 + (number + 0.5) * height
            axes.barh(place, value - start, left=start, height=height * 0.92, color=colours[name])
            axes.text(value, place, f" {label(value)}", va="center", fontsize=7)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=PICTURE, show_default=False)
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=False)
def main(output: Path, results: Path) -> None:
    found = newest(results, "layer")
    if not found:
        raise click.ClickException("no result of benchmarks.layer yet")
    draw(found[0], output)


if __name__ == "__main__":
    main()
