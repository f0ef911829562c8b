"""How far a stream's memories are from those of another stream, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .metrics import MemoryDistance

Fields = Mapping[str, NDArray[np.float32]]  # as titans_runtime.Stream.memory gives them

# Fields of a packed row that together are a layer's W, and those that are its S (docs/operator.md).
_WEIGHTS, _SURPRISE = re.compile(r"W\d+|gamma"), re.compile(r"S\d+|S_gamma")


def distances(position: int, got: Fields, right: Fields) -> list[MemoryDistance]:
    """Of each layer that has a memory, in the order of the fields."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in right)
    found = []
    for layer in layers:
        weights, surprise = (_pair(got, right, layer, pattern) for pattern in (_WEIGHTS, _SURPRISE))
        if weights is None:
            continue
        found.append(
            MemoryDistance(
                position,
                layer,
                weights=weights[0],
                surprise=surprise[0] if surprise else None,
                weights_norm=weights[1],
                base_weights_norm=weights[2],
                surprise_norm=surprise[1] if surprise else None,
                base_surprise_norm=surprise[2] if surprise else None,
            )
        )
    return found


def _pair(got: Fields, right: Fields, layer: str, pattern: re.Pattern[str]) -> tuple[float, float, float] | None:
    """Relative distance and both norms of the fields that the pattern names; None where the layer has none."""
    names = [name for name in right if name.rpartition(".")[0] == layer and pattern.fullmatch(name.rpartition(".")[2])]
    if not names:
        return None
    squares = np.zeros(3)
    with np.errstate(invalid="ignore", over="ignore"):
        for name in names:
            a, b = got[name].astype(np.float64), right[name].astype(np.float64)
            squares += [np.square(a - b).sum(), np.square(a).sum(), np.square(b).sum()]
        distance, norm, base_norm = (float(value) for value in np.sqrt(squares))
    if distance == 0:
        return 0.0, norm, base_norm
    relative = distance / base_norm if base_norm else math.inf
    return math.inf if math.isnan(relative) else relative, norm, base_norm


def worst(found: Sequence[MemoryDistance], last: int) -> dict[str, float | None]:
    """The farthest layer's distances of W and of S, each a layer's mean over the last so many positions."""
    means: dict[str, list[float]] = {"weights": [], "surprise": []}
    for layer in dict.fromkeys(entry.layer for entry in found):
        own = [entry for entry in found if entry.layer == layer][-last:]
        means["weights"].append(math.fsum(entry.weights for entry in own) / len(own))
        surprise = [entry.surprise for entry in own if entry.surprise is not None]
        if surprise:
            means["surprise"].append(math.fsum(surprise) / len(surprise))
    return {name: max(values, default=None) for name, values in means.items()}
