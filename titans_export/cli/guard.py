"""`titans-export guard`: limits that stop a memory from diverging, found from data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..manifest import GUARD_POLICIES
from .command import Command, emit, json_option, note, say
from .kinds import check_bundle
from .options import (
    PATH,
    SessionOptions,
    bundle_argument,
    check_finite,
    encoding_option,
    engine_option,
    open_session,
    restart_option,
    session_options,
)
from .progress import progress_bar
from .table import table

if TYPE_CHECKING:
    from ..guarding import FoundLimits
    from ..manifest import Guard


@dataclass(frozen=True, kw_only=True)
class GuardOptions(SessionOptions):
    """The options of `guard`."""

    bundle: Path
    output: Path | None
    data: tuple[Path, ...]
    tokens: int
    piece: int
    seed: int
    encoding_errors: str
    margin: float
    policy: str
    restart_every: int
    clear: bool
    dry_run: bool
    overwrite: bool
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export guard mac.titans --data book.txt",
        "titans-export guard mac.titans --data book.txt --policy freeze --margin 8 --overwrite",
        "titans-export guard mac.titans --data book.txt --dry-run --json",
        "titans-export guard mac.titans --clear",
    ),
)
@bundle_argument
@click.option("-o", "--output", type=PATH, metavar="NAME.titans", help="Bundle to write.  [default: change BUNDLE]")
@click.option("--data", type=PATH, multiple=True, metavar="FILE", help="Usual input: text, .npz or .jsonl; repeatable.")
@click.option("--tokens", type=click.IntRange(1), default=1 << 17, help="Maximum number of tokens to read.")
@click.option("--piece", type=click.IntRange(1), default=1 << 14, help="Tokens of a stream with a fresh memory.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Seed of the sampling of longer data.")
@encoding_option
@click.option(
    "--margin",
    type=click.FloatRange(1, min_open=True),
    default=4.0,
    help="FoundLimits, as a multiple of the largest norms in the data.",
)
@click.option(
    "--policy",
    type=click.Choice(GUARD_POLICIES),
    default="rewind",
    help="What a stream does when a norm exceeds its limit; see docs/guard.md.",
)
@restart_option
@click.option("--clear", is_flag=True, help="Remove the limits and the policy from the bundle.")
@click.option("--dry-run", is_flag=True, help="Show the limits; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace limits that the bundle has, or an existing OUTPUT.")
@engine_option
@session_options
@json_option
def guard(**values: Any) -> None:
    """Find limits for a bundle's memory, and write them into the bundle.

    Streams with a fresh memory read pieces of the data. The limit of each weight and surprise is a multiple of the
    largest norm seen; pieces whose memory diverges do not count. The runtime then keeps every stream within the limits,
    by the policy.
    """
    _guard(GuardOptions(**values))


def _guard(options: GuardOptions) -> None:
    from ..guarding import check_target, cleared, write_guard

    if options.clear == bool(options.data):
        code, problem = (
            ("E0102", "--clear and --data exclude each other") if options.clear else ("E0103", "missing --data")
        )
        raise UsageError(code, "guard", problem, "give --data FILE to find limits, or --clear to remove them")
    if options.policy == "off" and options.restart_every:
        problem = "--policy off and --restart-every exclude each other"
        raise UsageError("E0102", "guard", problem, "take another policy, such as restart")
    check_finite("guard", "--margin", options.margin)
    if not options.dry_run:
        check_target(options.bundle, options.output, options.overwrite or (options.clear and options.output is None))
    check_bundle(options.bundle)
    from ..bundle import read_bundle

    bundle = read_bundle(options.bundle)
    if options.clear:
        kept = cleared(bundle.manifest.guard)
        path = options.bundle if options.dry_run else write_guard(bundle, kept, options.output, options.overwrite)
        if options.as_json:
            emit(
                {"bundle": str(path), "written": not options.dry_run, "guard": None if kept is None else kept.to_json()}
            )
        else:
            say(f"{path}: no limits")
        return
    limits, record = _find(options)
    path = options.bundle
    if not options.dry_run:
        path = write_guard(bundle, record, options.output, options.overwrite)
    _show(options, path, limits, record)


def _find(options: GuardOptions) -> tuple[FoundLimits, Guard]:
    from titans_calibration.data import read_data

    from ..bundle import read_bundle
    from ..guarding import find_limits, guard_record, read_pieces

    data = read_data(read_bundle(options.bundle), options.data, options.tokens, options.seed, options.encoding_errors)
    session = open_session(options.bundle, options)
    with session, progress_bar("reading", data.tokens, "tok") as advance:
        pieces = read_pieces(session, data.streams, data.sources, options.piece, advance)
    limits = find_limits(pieces, options.margin)
    return limits, guard_record(limits, options.policy, options.restart_every, options.margin, data.entry())


def _show(options: GuardOptions, path: Path, limits: FoundLimits, record: Guard) -> None:
    for piece in limits.pieces:
        if piece.left_out is not None:
            note(f"left out {piece.source}, tokens {piece.start} to {piece.start + piece.tokens}: {piece.left_out}")
    if options.as_json:
        pieces = [{**dataclasses.asdict(piece), "norms": dict(piece.norms)} for piece in limits.pieces]
        emit({"bundle": str(path), "written": not options.dry_run, "guard": record.to_json(), "pieces": pieces})
        return
    assert record.data is not None
    kept = sum(piece.left_out is None for piece in limits.pieces)
    restart = f", every memory is reset after each {record.restart_every} tokens" if record.restart_every else ""
    rows = [(name, _number(one.seen), _number(one.limit)) for name, one in record.fields.items()]
    say(
        f"{path}: {'limits found, not written' if options.dry_run else 'limits written'}, from {record.data.tokens:,} "
        f"tokens in {kept} of {len(limits.pieces)} pieces\npolicy {record.policy}{restart}\n"
        + table(("norm of", "largest seen", "limit"), rows)
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
