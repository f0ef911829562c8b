"""`titans-export quantize`: a bundle with low-precision matmuls, embedding and memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..files import check_output
from ..manifest import MANIFEST
from .choices import RECIPE, TARGET
from .command import Command, emit, json_option, note, say
from .kinds import check_bundle
from .options import PATH, encoding_option
from .progress import progress_bar
from .table import number, size, table

if TYPE_CHECKING:
    from titans_calibration.quantize import QuantizePlan, QuantizeReport
    from titans_calibration.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The options of `quantize`."""

    bundle: Path | None
    output: Path | None
    recipe: str | None
    data: tuple[Path, ...]
    encoding_errors: str
    tokens: int
    seed: int
    memory: str | None
    keep: tuple[str, ...]
    target: str | None
    dry_run: bool
    list_recipes: bool
    overwrite: bool
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export quantize mac.titans -o mac-int8.titans --recipe int8 --data book.txt",
        "titans-export quantize mac.titans -o small.titans --recipe int4-weight-only --data book.txt --memory int8",
        "titans-export quantize mac.titans -o mine.titans --recipe mine.toml --data tokens.npz --json",
        "titans-export quantize --list-recipes",
    ),
)
@click.argument("bundle", type=PATH, required=False)
@click.option("-o", "--output", type=PATH, metavar="NAME.titans", help="Bundle to write.")
@click.option("--recipe", type=RECIPE, metavar="NAME|FILE.toml", help="Formats of weights, activations and memory.")
@click.option(
    "--data",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Calibration data: text (- for stdin), .npz or .jsonl.",
)
@encoding_option
@click.option("--tokens", type=click.IntRange(1), default=1 << 15, help="Maximum number of calibration tokens.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Seed of the sampling of longer data.")
@click.option("--memory", metavar="DTYPE[:ROUNDING]", help="Memory dtype and rounding.  [default: the recipe's]")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Weights to keep in float32, such as model.head.*.")
@click.option(
    "--target", type=TARGET, metavar="NAME", help="Refuse formats that this device does not support; see build."
)
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
@click.option("--list-recipes", is_flag=True, help="List the built-in recipes.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle once the new one is complete and checked.")
@json_option
def quantize(**values: Any) -> None:
    """Quantise a bundle.

    Writes a new bundle with matmuls, embedding and memory in the formats of a recipe. Calibration runs the bundle over
    the data while its memory learns. The same command resumes an interrupted calibration.
    """
    _quantize(QuantizeOptions(**values))


def _quantize(options: QuantizeOptions) -> None:
    if options.list_recipes:
        _list(options.as_json)
        return
    bundle, recipe, output = options.bundle, options.recipe, options.output
    for name, missing in (
        ("BUNDLE", bundle is None),
        ("--recipe", recipe is None),
        ("-o", output is None and not options.dry_run),
    ):
        if missing:
            raise UsageError("E0103", "quantize", f"missing {name}", "give it, or see --list-recipes")
    assert bundle is not None and recipe is not None
    if output is not None and not options.dry_run:
        check_output(output, options.overwrite, MANIFEST, source=bundle)
    check_bundle(bundle)
    from titans_calibration import options as library
    from titans_calibration.quantize import plan_quantize, quantize_bundle

    chosen = _recipe(recipe, options.memory, options.keep)
    if options.data and not chosen.needs_data:
        note(f"the recipe {chosen.name} needs no data: --data is not read")
    given = library.QuantizeOptions(
        bundle,
        output,
        chosen,
        options.data,
        options.tokens,
        options.seed,
        options.overwrite,
        options.target,
        options.encoding_errors,
    )
    if options.dry_run:
        _show_plan(plan_quantize(given), options.as_json)
        return
    report = quantize_bundle(given, progress=note, bar=progress_bar)
    if options.as_json:
        emit(dataclasses.asdict(report))
        return
    _show(report)


def _recipe(name: str, memory: str | None, keep: tuple[str, ...]) -> Recipe:
    from titans_calibration.recipe import load_recipe, with_memory

    recipe = load_recipe(name)
    if memory is not None:
        recipe = with_memory(recipe, memory)
    return dataclasses.replace(recipe, keep=(*recipe.keep, *keep))


def _list(as_json: bool) -> None:
    from titans_calibration.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        emit({"recipes": [recipe.as_dict() for recipe in recipes]})
        return
    say(table(("recipe", "data", "description"), [(r.name, _yes(r.needs_data), r.description) for r in recipes]))


def _yes(value: bool) -> str:
    return "required" if value else "-"


def _show_plan(plan: QuantizePlan, as_json: bool) -> None:
    if as_json:
        emit(dataclasses.asdict(plan))
        return
    recipe, memory = plan.recipe, plan.recipe["memory"]
    rounding = "" if memory["dtype"] == "float32" else f", rounding {memory['rounding']}"
    lines = [
        f"{plan.bundle}: {plan.matmuls} matmuls, {plan.elements:,} weights, in {recipe['weights']['format']}",
        f"embedding {recipe['embedding']}, memory {memory['dtype']}{rounding}",
    ]
    if plan.data:
        lines.append(f"data: {plan.data['tokens']} tokens in {plan.data['streams']} streams ({plan.data['xxh3_128']})")
    lines += [f"{name} is kept in float32: {why}" for name, why in plan.kept.items()]
    say("\n".join(lines))


def _show(report: QuantizeReport) -> None:
    from titans_calibration.quantize import format_counts

    say(
        f"{report.bundle}: matmuls {format_counts(report.matmuls)}, {report.seconds} s\n"
        f"weights {size(report.weights_bytes)} (float32 {size(report.float32_weights_bytes)}), "
        f"state {size(report.state_bytes)} (float32 {size(report.float32_state_bytes)})\n"
        f"maximum difference from the float32 model over the golden stream: {number(report.max_abs_error)}"
    )
    if report.mixed:
        kept = report.mixed["kept"]
        say(f"kept: {', '.join(kept) or 'none'}")
        if report.mixed["bits"] is not None:
            say(
                f"bits per token on held-out data: {report.mixed['bits']:.4f} "
                f"(float32 {report.mixed['float32_bits']:.4f})"
            )
    if report.memory:
        rows = [(name, *_moves(windows)) for name, windows in report.memory.items()]
        say("\n" + table(("memory", "first window", "last window", "widest"), rows))


def _moves(windows: list[list[float]]) -> list[str]:
    """The range of values in the first window, in the last one, and over all."""
    low, high = min(w[1] for w in windows), max(w[2] for w in windows)
    return [f"[{a:.3g}, {b:.3g}]" for a, b in (windows[0][1:], windows[-1][1:], (low, high))]
