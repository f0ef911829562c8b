"""`titans-export diff`: compares the states of two streams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from .command import Command, emit, json_option, say
from .kinds import check_state
from .options import PATH, key_option
from .table import number, table

if TYPE_CHECKING:
    from ..states import Comparison, SavedState

_SHOWN = 8  # differing fields in the table


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """The options of `diff`; `tolerance` None asks for identical states."""

    a: Path
    b: Path
    tolerance: float | None
    key_file: Path | None
    as_json: bool


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
    help="Maximum relative distance of any memory's W or S.  [default: identical states]",
)
@key_option
@json_option
def diff(**values: Any) -> None:
    """Compare the states of two streams of one model.

    Compares positions and, for each memory, the relative distance and the cosine of W and S. Exit code 0 if the states
    are identical or, with --tolerance, if no memory's distance exceeds it; 3 otherwise.
    """
    _diff(DiffOptions(**values))


def _diff(options: DiffOptions) -> None:
    check_state(options.a)
    check_state(options.b)
    from ..states import compare_states, open_state, read_key

    key = None if options.key_file is None else read_key(options.key_file)
    one, other = open_state(options.a, key), open_state(options.b, key)
    found, tolerance = compare_states(one, other), options.tolerance
    passed = found.identical or (tolerance is not None and found.largest_distance <= tolerance)
    if options.as_json:
        emit(_as_json(one, other, found, tolerance, passed))
    else:
        say(_text(one, other, found))
    if not passed:
        raise _mismatch(one, other, found, tolerance)


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
        "memory_dtypes": [one.metadata.get("memory"), other.metadata.get("memory")],
        **dataclasses.asdict(found),
    }


def _text(one: SavedState, other: SavedState, found: Comparison) -> str:
    head = [
        "identical" if found.identical else f"different, largest distance {_distance(found.largest_distance)}",
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
    header = ("memory", "distance of W", "cosine", "distance of S", "cosine", "farthest W")
    sections = ["\n".join(head), table(header, rows) if rows else ""]
    if found.fields:
        most = [(f.name, _distance(f.distance), number(f.max_abs)) for f in found.fields[:_SHOWN]]
        more = len(found.fields) - len(most)
        sections.append(table(("field", "distance", "max difference"), most) + (f"\nand {more} more" if more else ""))
    return "\n\n".join(section for section in sections if section)


def _side(state: SavedState) -> str:
    memory_dtype = (state.metadata.get("memory") or {}).get("dtype")
    mode = "learning" if state.learning else "frozen"
    return f"{state.path}, {state.model.get('name')}, position {state.position:,}, {mode}, memory dtype {memory_dtype}"


def _distance(value: float) -> str:
    return f"{100 * value:.3g} %"


def _mismatch(one: SavedState, other: SavedState, found: Comparison, tolerance: float | None) -> MismatchError:
    if found.largest_distance:
        detail = f"distance of W or S {_distance(found.largest_distance)}"
    elif one.position != other.position:
        detail = f"positions {one.position} and {other.position}"
    else:
        detail = "fields other than W and S differ"
    if tolerance is None:
        return MismatchError("E0903", "diff", f"states differ: {detail}", "allow for a difference with --tolerance")
    return MismatchError(
        "E0903",
        "diff",
        f"states differ: expected a distance of at most {_distance(tolerance)}, got {detail}",
        "look at the memories with the largest distance",
    )
