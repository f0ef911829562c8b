"""`titans-export quantize`: a bundle with low-precision matmuls, embedding and memory."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .command import Command, emit, json_option, note
from .options import PATH
from .progress import progress_bar
from .table import number, size, table

if TYPE_CHECKING:
    from titans_calibration.quantize import QuantizePlan, QuantizeReport
    from titans_calibration.recipe import Recipe


@click.command(
    cls=Command,
    examples=(
        "titans-export quantize mac.titans -o mac-int8.titans --recipe int8 --data book.txt",
        "titans-export quantize mac.titans -o small.titans --recipe int4-weight-only --data book.txt --memory int8",
        "titans-export quantize mac.titans -o mine.titans --recipe mine.toml --data tokens.npz --json",
        "titans-export quantize --list-recipes",
    ),
)
@click.argument("bundle", type=PATH, required=False)
@click.option("-o", "--output", type=PATH, metavar="NAME.titans", help="Bundle to write.")
@click.option("--recipe", metavar="NAME|FILE.toml", help="What becomes what; see --list-recipes.")
@click.option("--data", type=PATH, multiple=True, metavar="FILE", help="Text, .npz or .jsonl to find ranges from.")
@click.option("--tokens", type=click.IntRange(1), default=1 << 15, help="Tokens of the data to take at most.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Draws the pieces of longer data.")
@click.option("--memory", metavar="DTYPE[:ROUNDING]", help="How memories are held.  [default: the recipe's]")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Weights to leave in float32, such as model.head.*.")
@click.option("--target", metavar="NAME", help="Refuse what this device cannot run; see titans-export build.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@click.option("--list-recipes", is_flag=True, help="List the built-in recipes.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is whole and has run.")
@json_option
def quantize(
    bundle: Path | None,
    output: Path | None,
    recipe: str | None,
    data: tuple[Path, ...],
    tokens: int,
    seed: int,
    memory: str | None,
    keep: tuple[str, ...],
    target: str | None,
    dry_run: bool,
    list_recipes: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Quantise a bundle.

    BUNDLE's products, embedding and memories in the numbers that the recipe names, as a new bundle. Ranges are found
    by running the bundle over the data, its memory learning as it will. Stopped, the same command goes on where it was.
    """
    if list_recipes:
        _list(as_json)
        return
    for what, value in (("a bundle", bundle), ("--recipe", recipe), ("-o", output or dry_run)):
        if not value:
            raise UsageError("quantize", "BUNDLE, -o and --recipe", f"not {what}", "give it, or see --list-recipes")
    assert bundle is not None and recipe is not None
    from titans_calibration.quantize import plan_quantize, quantize_bundle

    chosen = _recipe(recipe, memory, keep)
    if data and not chosen.needs_data:
        note(f"the recipe {chosen.name} is not found from data: --data is not read")
    if dry_run:
        plan = plan_quantize(
            bundle, output, chosen, data, tokens=tokens, seed=seed, overwrite=overwrite, target=target
        )  # fmt: skip
        _show_plan(plan, as_json)
        return
    assert output is not None
    report = quantize_bundle(
        bundle,
        output,
        chosen,
        data,
        tokens=tokens,
        seed=seed,
        overwrite=overwrite,
        target=target,
        progress=note,
        bar=partial(progress_bar, unit="token"),
    )
    if as_json:
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
    click.echo(table(("recipe", "data", "what"), [(r.name, _yes(r.needs_data), r.description) for r in recipes]))


def _yes(value: bool) -> str:
    return "needed" if value else "-"


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
    lines += [f"{name} stays float32: {why}" for name, why in plan.kept.items()]
    click.echo("\n".join(lines))


def _show(report: QuantizeReport) -> None:
    from titans_calibration.quantize import format_counts

    click.echo(
        f"{report.bundle}: matmuls {format_counts(report.matmuls)}, {report.seconds} s\n"
        f"weights {size(report.weights_bytes)} (float32 {size(report.float32_weights_bytes)}), "
        f"state {size(report.state_bytes)} (float32 {size(report.float32_state_bytes)})\n"
        f"largest difference to the float32 model over the golden stream: {number(report.max_abs_error)}"
    )
    if report.mixed:
        kept = report.mixed["kept"]
        click.echo(f"kept: {', '.join(kept) or 'none'}")
        if report.mixed["bits"] is not None:
            click.echo(
                f"bits a token, held-back data: {report.mixed['bits']:.4f} (float32 {report.mixed['float32_bits']:.4f})"
            )
    if report.memory:
        rows = [(name, *_moves(windows)) for name, windows in report.memory.items()]
        click.echo("\n" + table(("memory", "first window", "last window", "widest"), rows))


def _moves(windows: list[list[float]]) -> list[str]:
    """The range in the first and the last window, and over all."""
    low, high = min(w[1] for w in windows), max(w[2] for w in windows)
    return [f"[{a:.3g}, {b:.3g}]" for a, b in (windows[0][1:], windows[-1][1:], (low, high))]
