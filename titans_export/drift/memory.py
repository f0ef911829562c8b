"""Distances between the memories of two streams, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import MemoryDistance

Fields = Mapping[str, NDArray[np.float32]]  # as titans_runtime.Stream.memory gives them

Kinds = Mapping[str, str | None]  # a field's full name to its kind


def kinds_of(info: Mapping[str, Any]) -> Kinds:
    """The kind of every field of the memories, from a session's info."""
    return {f"{state['name']}.{field}": kind for state in info["state"] for field, kind in state["fields"].items()}


def distances(position: int, got: Fields, reference: Fields, kinds: Kinds) -> list[MemoryDistance]:
    """The distance of each layer's memory, in the order of the fields."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in reference)
    found = []
    for layer in layers:
        weights, surprise = (_pair(got, reference, layer, kinds, kind) for kind in ("weights", "surprise"))
        if weights is None:
            continue
        found.append(
            MemoryDistance(
                position,
                layer,
                weights=weights[0],
                surprise=surprise[0] if surprise else None,
                weights_norm=weights[1],
                reference_weights_norm=weights[2],
                surprise_norm=surprise[1] if surprise else None,
                reference_surprise_norm=surprise[2] if surprise else None,
            )
        )
    return found


def _pair(got: Fields, reference: Fields, layer: str, kinds: Kinds, kind: str) -> tuple[float, float, float] | None:
    """Relative distance and both norms of a layer's fields of that kind; None without any."""
    names = [name for name in reference if name.rpartition(".")[0] == layer and kinds.get(name) == kind]
    if not names:
        return None
    squares = np.zeros(3)
    with np.errstate(invalid="ignore", over="ignore"):
        for name in names:
            a, b = got[name].astype(np.float64), reference[name].astype(np.float64)
            squares += [np.square(a - b).sum(), np.square(a).sum(), np.square(b).sum()]
        distance, norm, reference_norm = (float(value) for value in np.sqrt(squares))
    if distance == 0:
        return 0.0, norm, reference_norm
    relative = distance / reference_norm if reference_norm else math.inf
    return math.inf if math.isnan(relative) else relative, norm, reference_norm


def worst(found: Sequence[MemoryDistance], last: int) -> dict[str, float | None]:
    """The largest distances of W and S, each a layer's mean over the `last` positions."""
    means: dict[str, list[float]] = {"weights": [], "surprise": []}
    for layer in dict.fromkeys(entry.layer for entry in found):
        own = [entry for entry in found if entry.layer == layer][-last:]
        means["weights"].append(math.fsum(entry.weights for entry in own) / len(own))
        surprise = [entry.surprise for entry in own if entry.surprise is not None]
        if surprise:
            means["surprise"].append(math.fsum(surprise) / len(surprise))
    return {name: max(values, default=None) for name, values in means.items()}
