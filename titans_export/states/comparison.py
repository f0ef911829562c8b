"""Comparison of two saved streams of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import StateError
from ..row_fields import STORED_KINDS
from .reading import SavedState
from .statistics import by_head

# Fields of some memory dtypes and roundings only; all others are in every row.
_OF_ROUNDING = ("rounding_error", "update_count")


@dataclass(frozen=True)
class Distance:
    """Distance between arrays a and b. `distance` is ||a - b|| / max(||a||, ||b||), from 0 to 2, or infinite if one is
    not finite. `cosine` is that of the angle between them, None if one is zero."""

    distance: float
    cosine: float | None
    norms: tuple[float, float]


@dataclass(frozen=True)
class MemoryComparison:
    """Distances of W and S over all heads, and the head with the largest distance of W."""

    name: str
    weights: Distance
    surprise: Distance | None
    farthest_head: int
    farthest_head_distance: float


@dataclass(frozen=True)
class FieldDistance:
    """Relative distance and maximum absolute difference of a tensor or of a field of a memory."""

    name: str
    distance: float
    max_abs: float


@dataclass(frozen=True)
class Comparison:
    """`identical`: same position, learning and bits. `largest_distance`: the largest of any memory's W or S. `fields`:
    the fields that differ, the largest distance first."""

    identical: bool
    largest_distance: float
    memories: list[MemoryComparison]
    fields: list[FieldDistance]


def compare_states(a: SavedState, b: SavedState) -> Comparison:
    """Compares two states of one model, also where one holds its memory in another dtype. Raises StateError."""
    _check_alike(a, b)
    with np.errstate(all="ignore"):
        memories = [_compare_memory(a, b, name) for name in a.memories()]
        fields = [_field(name, x, y) for name, x, y in _pairs(a, b)]
    distances = [d.distance for entry in memories for d in (entry.weights, entry.surprise) if d is not None]
    return Comparison(
        identical=_identical(a, b),
        largest_distance=max(distances, default=0.0),
        memories=memories,
        fields=sorted((field for field in fields if field.distance), key=lambda field: -field.distance),
    )


def _check_alike(a: SavedState, b: SavedState) -> None:
    weights = [state.model.get("weights_sha256") for state in (a, b)]
    fix = "compare states of one model"
    if weights[0] != weights[1]:
        names = [f"{s.model.get('name')} (weights {str(sha)[:12]})" for s, sha in zip((a, b), weights, strict=True)]
        problem = f"states of different models: {a.path} of {names[0]}, {b.path} of {names[1]}"
        raise StateError("E0407", "diff", problem, fix)
    one, other = _logical_shapes(a), _logical_shapes(b)
    if one != other:
        name = next(name for name in {**one, **other} if one.get(name) != other.get(name))
        shapes = f"{_words(one.get(name))} in {a.path}, {_words(other.get(name))} in {b.path}"
        raise StateError("E0455", "diff", f"different shapes of {name}: {shapes}", fix)


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _logical_shapes(state: SavedState) -> dict[str, tuple[int, ...]]:
    memories = state.memories()
    shapes = {e.name: state.tensors[e.name].shape for e in state.entries if e.name not in memories}
    skipped = {name for memory in memories for name in state.fields_of(memory, *_OF_ROUNDING)}
    return shapes | {name: values.shape for name, values in state.fields.items() if name not in skipped}


def _identical(a: SavedState, b: SavedState) -> bool:
    if (a.position, a.learning, set(a.tensors)) != (b.position, b.learning, set(b.tensors)):
        return False
    if any(a.layout(name) != b.layout(name) for name in a.memories()):
        return False
    return all(a.tensors[name].tobytes() == b.tensors[name].tobytes() for name in a.tensors)


def _pairs(a: SavedState, b: SavedState) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """W, S and G of memories and the other tensors, by name."""
    names = [name for memory in a.memories() for name in a.fields_of(memory, *STORED_KINDS)]
    others = [entry.name for entry in a.entries if entry.name not in a.memories()]
    return [(n, a.fields[n].astype(np.float64), b.fields[n].astype(np.float64)) for n in names] + [
        (n, a.tensors[n].astype(np.float64), b.tensors[n].astype(np.float64)) for n in others
    ]


def _field(name: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> FieldDistance:
    found = _distance(x, y)
    most = float(np.max(np.abs(x - y), initial=0.0))
    return FieldDistance(name, found.distance, math.inf if math.isnan(most) else most)


def _compare_memory(a: SavedState, b: SavedState, memory: str) -> MemoryComparison:
    found: list[Distance | None] = []
    farthest = (0, 0.0)
    for kind in ("weights", "surprise"):
        names = a.fields_of(memory, kind)
        x, y = by_head(a.fields, names), by_head(b.fields, names)
        if x is None or y is None:
            found.append(None)
            continue
        found.append(_distance(x, y))
        if kind == "weights":
            heads = [_distance(one, other).distance for one, other in zip(x, y, strict=True)]
            farthest = max(enumerate(heads), key=lambda head: head[1])
    weights, surprise = found
    if weights is None:
        raise StateError("E0454", "diff", f"memory without weights: {memory}", "save the streams again")
    return MemoryComparison(memory, weights, surprise, *farthest)


def _distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> Distance:
    one, other = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if not (math.isfinite(one) and math.isfinite(other)):
        return Distance(math.inf, None, (one, other))
    larger = max(one, other)
    distance = float(np.linalg.norm(x - y)) / larger if larger else 0.0
    cosine = float(np.sum(x * y) / (one * other)) if one and other else None
    return Distance(distance, None if cosine is None else max(-1.0, min(1.0, cosine)), (one, other))
