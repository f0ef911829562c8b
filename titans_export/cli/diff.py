"""`titans-export diff`: how far the states of two streams are apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from .command import Command, emit, json_option
from .options import PATH, key_option
from .table import number, table

if TYPE_CHECKING:
    from ..states import Comparison, SavedState

_SHOWN = 8  # of the tensors that differ


@click.command(
    cls=Command,
    examples=(
        "titans-export diff monday.tstate tuesday.tstate",
        "titans-export diff float32.tstate int8.tstate --tolerance 0.01 --json",
    ),
)
@click.argument("a", type=PATH, metavar="A")
@click.argument("b", type=PATH, metavar="B")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest relative distance of any memory's W or S.  [default: every bit the same]",
)
@key_option
@json_option
def diff(a: Path, b: Path, tolerance: float | None, key_file: Path | None, as_json: bool) -> None:
    """Compare the states of two streams of one model.

    Of the files A and B: position, and memory by memory the relative distance and the cosine of W and of S. Exit code 0
    if every bit is the same or, with --tolerance, if no memory is farther apart; 3 if not.
    """
    from ..states import compare_states, open_state, read_key

    key = None if key_file is None else read_key(key_file)
    one, other = open_state(a, key), open_state(b, key)
    found = compare_states(one, other)
    passed = found.identical or (tolerance is not None and found.largest_distance <= tolerance)
    if as_json:
        emit(_as_json(one, other, found, tolerance, passed))
    else:
        click.echo(_text(one, other, found))
    if not passed:
        raise _apart(one, other, found, tolerance)


def _as_json(
    one: SavedState, other: SavedState, found: Comparison, tolerance: float | None, passed: bool
) -> dict[str, Any]:
    return {
        "states": [str(one.path), str(other.path)],
        "passed": passed,
        "tolerance": tolerance,
        "model": one.model,
        "positions": [one.position, other.position],
        "learning": [one.learning, other.learning],
        "memory_dtypes": [one.facts.get("memory"), other.facts.get("memory")],
        **dataclasses.asdict(found),
    }


def _text(one: SavedState, other: SavedState, found: Comparison) -> str:
    head = [
        "identical" if found.identical else f"different, by {_distance(found.largest_distance)} at most",
        f"A: {_side(one)}",
        f"B: {_side(other)}",
    ]
    rows = []
    for entry in found.memories:
        row: list[str] = [entry.name]
        for distance in (entry.weights, entry.surprise):
            if distance is None:
                row += ["-", "-"]
            else:
                row += [_distance(distance.distance), "-" if distance.cosine is None else f"{distance.cosine:.4f}"]
        rows.append((*row, f"head {entry.farthest_head}, {_distance(entry.farthest_head_distance)}"))
    header = ("memory", "W apart", "cosine", "S apart", "cosine", "farthest W")
    sections = ["\n".join(head), table(header, rows) if rows else ""]
    if found.fields:
        most = [(f.name, _distance(f.distance), number(f.max_abs)) for f in found.fields[:_SHOWN]]
        more = len(found.fields) - len(most)
        sections.append(
            table(("differs most", "apart", "max difference"), most) + (f"\nand {more} more" if more else "")
        )
    return "\n\n".join(section for section in sections if section)


def _side(state: SavedState) -> str:
    memory_dtype = (state.facts.get("memory") or {}).get("dtype")
    doing = "learning" if state.learning else "frozen"
    return f"{state.path}, {state.model.get('name')}, position {state.position:,}, {doing}, memories in {memory_dtype}"


def _distance(value: float) -> str:
    return f"{100 * value:.3g} %"


def _apart(one: SavedState, other: SavedState, found: Comparison, tolerance: float | None) -> MismatchError:
    if found.largest_distance:
        got = f"W or S apart by {_distance(found.largest_distance)}"
    elif one.position != other.position:
        got = f"positions {one.position} and {other.position}"
    else:
        got = "other differences"
    if tolerance is None:
        expected, remedy = "the same state in both files", "allow for a difference with --tolerance"
    else:
        expected, remedy = f"memories within {_distance(tolerance)}", "look at the memories that are farthest apart"
    return MismatchError("diff", expected, got, remedy)
