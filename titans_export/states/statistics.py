"""Statistics of the memories of a saved stream, by memory and head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import BLOCK, MEMORY_DTYPES, SCALED, matrix
from ..errors import StateError
from ..manifest import LayoutField
from ..row_fields import STORED_KINDS
from .open_chunk import open_chunk_change, used_rows
from .reading import Floats, SavedState

Heads = NDArray[np.float64]  # (heads, elements)


@dataclass(frozen=True)
class Norms:
    """W or S of a memory. `norm` is the Frobenius norm over all heads, `head_norms` that of each."""

    norm: float
    rms: float
    max_abs: float
    head_norms: list[float]
    largest_head: int


@dataclass(frozen=True)
class Saturation:
    """Use of the dtype's range, as fractions of the elements of W and S and their auxiliary fields.

    `at_limit`: elements of the largest magnitude of the dtype, for int8 and fp8 that of their block's scale. `zero`:
    elements that are 0. `dead_blocks`: blocks of zeros only; None without blocks.
    """

    dtype: str
    elements: int
    at_limit: float
    zero: float
    dead_blocks: float | None


@dataclass(frozen=True)
class MemoryInfo:
    """Statistics of a memory. `step` and `open_chunk` have one number per head.

    `step` is ||S|| / ||W||: the change of W by one more token of the same surprise. `open_chunk` is ||W' - W|| / ||W||,
    where W' is W after a chunk update now: 0 between chunks, None for memories with one set of gates per chunk.
    `from_fresh` is ||W - F|| over all heads, where F is the W of a fresh stream; None without one.
    """

    name: str
    heads: int
    weights: Norms
    surprise: Norms | None
    step: list[float] | None
    open_chunk: list[float] | None
    from_fresh: float | None
    from_fresh_heads: list[float] | None
    fresh_weights: Norms | None
    saturation: Saturation


@dataclass(frozen=True)
class NotFinite:
    """A tensor or a field of a memory with NaN or infinity. `heads` are the affected heads of a memory."""

    name: str
    nan: int
    infinite: int
    heads: list[int] | None


def describe_memories(state: SavedState, fresh: Mapping[str, Floats] | None = None) -> list[MemoryInfo]:
    """Statistics of each memory. `fresh` comes from `fresh_memory` for the bundle of the model."""
    with np.errstate(all="ignore"):  # `find_not_finite` reports NaN and infinity
        return [_describe(state, memory, fresh) for memory in state.memories()]


def find_not_finite(state: SavedState) -> list[NotFinite]:
    """NaN and infinity in values that the stream will compute with, in the state's order."""
    found, memories = [], state.memories()
    for entry in state.entries:
        name = entry.name
        if name not in memories:
            found.append(_count(name, state.tensors[name], heads=False))
            continue
        for field in entry.layout:
            values = _computed_with(state, name, field)
            if values is not None:
                found.append(_count(f"{name}.{field.name}", values, heads=True))
    if "last_output" in state.tensors:
        found.append(_count("last_output", state.tensors["last_output"], heads=False))
    return [entry for entry in found if entry.nan or entry.infinite]


def fresh_memory(bundle: Path, state: SavedState) -> dict[str, Floats]:
    """The memories' fields of a fresh stream of the bundle. Raises BundleError, and StateError for another model's."""
    from ..bundle import read_bundle
    from ..model.memory_dtype import unpack_row

    opened = read_bundle(bundle)
    own, wanted = state.model.get("weights_sha256"), opened.manifest.model.weights_sha256
    if own != wanted:
        raise StateError(
            "E0407",
            "state",
            f"{state.path} is of another model than {bundle}: expected weights {_short(wanted)}, got {_short(own)} "
            f"({state.model.get('name')})",
            "give the bundle that the stream ran on",
        )
    rows = opened.initial_state()
    return {
        f"{entry.name}.{name}": values
        for entry in opened.manifest.state
        if entry.role == "memory"
        for name, values in unpack_row(rows[entry.name], entry.layout).items()
    }


def by_head(fields: Mapping[str, Floats], names: Sequence[str]) -> Heads | None:
    """The fields side by side, float64 (heads, elements); None without any."""
    if not names:
        return None
    return np.concatenate([fields[name].astype(np.float64).reshape(fields[name].shape[1], -1) for name in names], -1)


def _short(sha256: object) -> str:
    return str(sha256)[:12]


def _describe(state: SavedState, memory: str, fresh: Mapping[str, Floats] | None) -> MemoryInfo:
    names = state.fields_of(memory, "weights")
    weights = by_head(state.fields, names)
    if weights is None:
        raise StateError("E0454", "state", f"memory without weights: {memory}", "save the stream again")
    surprise = by_head(state.fields, state.fields_of(memory, "surprise"))
    initial = by_head(fresh, names) if fresh is not None and set(names) <= set(fresh) else None
    sizes = np.linalg.norm(weights, axis=1)
    moved = None if initial is None else np.linalg.norm(weights - initial, axis=1)
    change = open_chunk_change(state.operator(memory), _row(state, memory))
    return MemoryInfo(
        name=memory,
        heads=len(weights),
        weights=_norms(weights),
        surprise=None if surprise is None else _norms(surprise),
        step=None if surprise is None else _ratios(np.linalg.norm(surprise, axis=1), sizes),
        open_chunk=None if change is None else _ratios(change, sizes),
        from_fresh=None if moved is None else float(np.linalg.norm(moved)),
        from_fresh_heads=None if moved is None else moved.tolist(),
        fresh_weights=None if initial is None else _norms(initial),
        saturation=_saturation(state, memory),
    )


def _ratios(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> list[float]:
    """As the runtime's guard has them: a memory of zeros counts as of norm 1."""
    found: list[float] = (parts / np.where(wholes == 0, 1.0, wholes)).tolist()
    return found


def _norms(values: Heads) -> Norms:
    heads = np.linalg.norm(values, axis=1)
    return Norms(
        norm=float(np.linalg.norm(values)),
        rms=float(np.sqrt(np.mean(np.square(values)))),
        max_abs=float(np.max(np.abs(values))),
        head_norms=heads.tolist(),
        largest_head=int(np.argmax(heads)),
    )


def _row(state: SavedState, memory: str) -> dict[str, Floats]:
    """A memory's fields by their names in the row, each (heads, *shape)."""
    return {field.name: state.fields[f"{memory}.{field.name}"][0] for field in state.layout(memory)}


def _computed_with(state: SavedState, memory: str, field: LayoutField) -> Floats | None:
    """The values of a field that the stream will read: rows of the open chunk that nothing reads are 0.

    None for a field whose values mean nothing by themselves: a count, or a field without a kind.
    """
    values = state.fields[f"{memory}.{field.name}"]
    if field.kind in (*STORED_KINDS, "higher_surprise", "rounding_error", "coefficient"):
        return values
    if field.kind != "open_chunk":
        return None
    used = used_rows(state.operator(memory), _row(state, memory))
    return None if used is None else np.where(used[None, ..., None], values, np.float32(0))


def _count(name: str, values: NDArray[Any], heads: bool) -> NotFinite:
    if not np.issubdtype(values.dtype, np.floating):
        return NotFinite(name, 0, 0, None)
    bad = ~np.isfinite(values)
    found = np.unique(np.nonzero(bad)[1]).tolist() if heads else None
    return NotFinite(name, int(np.isnan(values).sum()), int(np.isinf(values).sum()), found)


def _saturation(state: SavedState, memory: str) -> Saturation:
    kinds = (*STORED_KINDS, "rounding_error")
    stored = [field for field in state.layout(memory) if field.kind in kinds]
    dtype = next((field.dtype for field in stored if field.dtype != "float32"), "float32")
    counts = np.zeros(5)  # elements, at the limit, zeros, blocks, dead blocks
    for field in stored:
        values = state.fields[f"{memory}.{field.name}"]
        if field.dtype not in SCALED:
            limit = int(np.count_nonzero(np.abs(values) >= MEMORY_DTYPES[field.dtype]))
            counts[:3] += values.size, limit, int(np.count_nonzero(values == 0))
        else:
            counts += _block_counts(state.tensors[memory], field)
    elements, limit, zeros, blocks, dead = counts.tolist()
    of = max(elements, 1)
    return Saturation(dtype, int(elements), limit / of, zeros / of, dead_blocks=dead / blocks if blocks else None)


def _block_counts(rows: NDArray[Any], field: LayoutField) -> tuple[int, int, int, int, int]:
    """Of a field of codes and scales: elements, of the largest code, of code 0, blocks, blocks whose scale is 0."""
    height, width = matrix(field.shape)
    count, blocks = height * width, height * math.ceil(width / BLOCK)
    raw = np.ascontiguousarray(rows).view(np.uint8)[..., 4 * field.offset :]
    scales_at = 4 * math.ceil(count / 4)
    magnitude = np.abs(raw[..., :count].view(np.int8).astype(np.int16))
    largest = 127
    if field.dtype == "fp8":
        magnitude, largest = (raw[..., :count] & 0x7F).astype(np.int16), 0x7E
    scales = np.ascontiguousarray(raw[..., scales_at : scales_at + 2 * blocks]).view(np.uint16)
    return (
        magnitude.size,
        int(np.count_nonzero(magnitude == largest)),
        int(np.count_nonzero(magnitude == 0)),
        scales.size,
        int(np.count_nonzero(scales == 0)),
    )
