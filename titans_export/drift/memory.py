"""Distances between the memories of two streams, by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .metrics import MemoryDistance

Fields = Mapping[str, NDArray[np.float32]]  # as titans_runtime.Stream.memory gives them

# Fields of a packed row that form a layer's W, and those that form its S (docs/operator.md).
_WEIGHTS, _SURPRISE = re.compile(r"W\d+|gamma"), re.compile(r"S\d+|S_gamma")


def distances(position: int, got: Fields, reference: Fields) -> list[MemoryDistance]:
    """The distance of each layer's memory, in the order of the fields."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in reference)
    found = []
    for layer in layers:
        weights, surprise = (_pair(got, reference, layer, pattern) for pattern in (_WEIGHTS, _SURPRISE))
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


def _pair(got: Fields, reference: Fields, layer: str, pattern: re.Pattern[str]) -> tuple[float, float, float] | None:
    """Relative distance and both norms of the fields that match the pattern; None without any."""
    names = [
        name for name in reference if name.rpartition(".")[0] == layer and pattern.fullmatch(name.rpartition(".")[2])
    ]
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
