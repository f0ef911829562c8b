"""Limits of a bundle's guard: found from data, written into the manifest."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle
from .errors import OutputError, TitansError
from .files import check_file, check_output, replacing_file, replacing_folder
from .manifest import CalibrationData, Guard, GuardField, Manifest, read_manifest

if TYPE_CHECKING:
    import titans_runtime

PIECE = 1 << 14  # tokens of a stream with a fresh memory
MARGIN = 4.0  # a limit divided by the largest norm of healthy data
POLICY = "rewind"
_BLOCK = 1 << 12  # tokens per feed


class LimitsError(TitansError):
    """Data from which no limits can be found."""


@dataclass(frozen=True)
class Piece:
    """A piece of the data that one fresh stream has read. norms: the largest of each field.

    left_out: why its norms do not count, None if they do.
    """

    source: str
    start: int
    tokens: int
    norms: Mapping[str, float]
    left_out: str | None = None


@dataclass(frozen=True)
class FoundLimits:
    """The limits that were found, and the pieces they come from."""

    fields: Mapping[str, GuardField]
    pieces: tuple[Piece, ...]


def read_pieces(
    session: titans_runtime.Session,
    streams: Sequence[NDArray[Any]],
    sources: Sequence[str],
    length: int = PIECE,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Piece]:
    """Feeds pieces of about `length` tokens or vectors, each to a fresh stream, and measures its norms."""
    pieces = []
    for stream, source in zip(streams, sources, strict=True):
        start = 0
        for part in np.array_split(stream, max(1, round(len(stream) / length))):
            pieces.append(_read_piece(session, part, source, start, advance))
            start += len(part)
    return pieces


def _read_piece(
    session: titans_runtime.Session, part: NDArray[Any], source: str, start: int, advance: Callable[[int], None]
) -> Piece:
    import titans_runtime

    with session.stream() as stream:
        stream.guard("raise", bundle_limits=False)
        try:
            for at in range(0, len(part), _BLOCK):
                block = part[at : at + _BLOCK]
                stream.feed(block, outputs="none")
                advance(len(block))
        except titans_runtime.Error as error:
            if error.code != "TITANS-E0510":
                raise
            return Piece(source, start, len(part), stream.peak_norms(), "NaN or infinity")
        health = stream.health
        if health.divergences:
            reason = f"{health.field} diverged at position {start + health.position}"
            return Piece(source, start, len(part), stream.peak_norms(), reason)
        return Piece(source, start, len(part), stream.peak_norms())


def find_limits(pieces: Sequence[Piece], margin: float = MARGIN) -> FoundLimits:
    """The limit of each field: `margin` times the largest norm in the pieces that did not diverge.

    A piece counts as diverged if it was left out already, or if a norm exceeds `margin` times the median of all pieces.
    Raises LimitsError if all pieces diverged.
    """
    healthy = [piece for piece in pieces if piece.left_out is None]
    usual = {name: statistics.median_low(piece.norms[name] for piece in healthy) for name in _names(healthy)}
    judged = tuple(_judge(piece, usual, margin) for piece in pieces)
    kept = [piece for piece in judged if piece.left_out is None]
    seen = {name: max(piece.norms[name] for piece in kept) for name in _names(kept)}
    if not seen:
        first = next((piece.left_out for piece in judged), "no memory")
        problem = f"no limits in {len(pieces)} pieces of data: {first}"
        raise LimitsError("E0815", "guard", problem, "give data that the model was trained on, or shorter --piece")
    fields = {
        name: GuardField(seen=_short(value), limit=_short(margin * value) if value > 0 else None)
        for name, value in seen.items()
    }
    return FoundLimits(fields, judged)


def _names(pieces: Sequence[Piece]) -> list[str]:
    return list(pieces[0].norms) if pieces else []


def _judge(piece: Piece, usual: Mapping[str, float], margin: float) -> Piece:
    for name, norm in piece.norms.items():
        if piece.left_out is None and norm > margin * usual[name] > 0:
            return replace(piece, left_out=f"a norm of {name} of {norm:.3g}, {usual[name]:.3g} elsewhere")
    return piece


def _short(value: float) -> float:
    """The value to four digits, rounded up."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.4g}")


def guard_record(limits: FoundLimits, policy: str, restart_every: int, margin: float, data: Mapping[str, Any]) -> Guard:
    """The manifest's entry. data: hash, tokens and streams of the data."""
    return Guard(
        policy=policy,
        restart_every=restart_every,
        data=CalibrationData.from_json(dict(data), "guard.data"),
        margin=margin,
        fields=limits.fields,
    )


def cleared(guard: Guard | None) -> Guard | None:
    """The entry without limits and policy; the norms seen stay, for the health of streams."""
    seen = {name: GuardField(seen=one.seen) for name, one in guard.fields.items() if one.seen} if guard else {}
    return Guard(fields=seen) if seen else None


def check_target(bundle: Path, output: Path | None, overwrite: bool) -> None:
    """Checks that limits may be written, before any work. Raises OutputError."""
    if output is not None and output.resolve() != bundle.resolve():
        check_output(output, overwrite, MANIFEST, source=bundle)
        files = read_manifest(bundle).files.values()
        check_output(output, overwrite, MANIFEST, source=bundle, needs=sum(file.bytes for file in files))
        return
    guard = read_manifest(bundle).guard
    if guard is not None and guard.limits and not overwrite:
        raise OutputError(
            "E1008", "output", f"{bundle} has limits already", "give --overwrite, or another bundle with -o"
        )
    check_file(bundle / MANIFEST)


def write_guard(bundle: Bundle, guard: Guard | None, output: Path | None, overwrite: bool) -> Path:
    """Writes the entry into the manifest of the bundle or of a copy, which are renamed into place atomically.

    Other changes of the bundle since it was read are kept. Raises OutputError. Returns the path of the bundle.
    """
    manifest: Manifest = replace(read_manifest(bundle.path), guard=guard)
    if output is None or output.resolve() == bundle.path.resolve():
        with replacing_file(bundle.path / MANIFEST) as aside:
            aside.write_text(manifest.text(), encoding="utf-8")
        return bundle.path
    with replacing_folder(output, overwrite, MANIFEST) as folder:
        for name in manifest.files:
            shutil.copy2(bundle.path / name, folder / name, follow_symlinks=False)
        manifest.write(folder)
    return output


def seen_norms(stream: titans_runtime.Stream, names: Sequence[str], before: Mapping[str, float]) -> dict[str, float]:
    """The largest norm of each field: of the stream's memory now, and `before`."""
    memory = stream.memory()
    found = dict(before)
    for name in names:
        values = memory[name].astype(np.float64)
        norms = np.sqrt(np.square(values).sum(axis=tuple(range(2, values.ndim))))
        found[name] = max(found.get(name, 0.0), float(norms.max()))
    return found


def seen_record(norms: Mapping[str, float]) -> Guard | None:
    """The manifest's entry of norms without limits. Rounded up to one digit, so that machines agree on the manifest."""
    fields = {}
    for name, value in norms.items():
        if 0 < value < math.inf:
            unit = 10.0 ** math.floor(math.log10(value))
            fields[name] = GuardField(seen=float(f"{math.ceil(value / unit - 1e-6) * unit:.1g}"))
    return Guard(fields=fields) if fields else None
