"""Draws tokens from logits, as the runtime's `generate` does, for streams that are stepped in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ServeError

Floats = npt.NDArray[np.float32]
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the arguments of `titans_runtime.Stream.generate`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def uniform(seed: int, index: int) -> float:
    """The index-th draw in [0, 1) of a seed: SplitMix64."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


def sample(logits: Floats, sampling: Sampling, index: int) -> int:
    """The token of one draw. logits: (vocab,). The filters apply in the order top_k, top_p, min_p."""
    top = _finite_maximum(logits)
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits.astype(np.float64) - top) / sampling.temperature)
    tokens: npt.NDArray[Any] = np.arange(len(logits))
    limits = 0 < sampling.top_k < len(logits)
    if limits or sampling.top_p < 1:
        tokens = np.argsort(-logits, kind="stable")[: sampling.top_k if limits else None]
        weights = weights[tokens]
    if sampling.top_p < 1:
        sums = np.cumsum(weights)
        kept = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
        tokens, weights = tokens[:kept], weights[:kept]
    keep = weights >= sampling.min_p
    tokens, sums = tokens[keep], np.cumsum(weights[keep])
    draw = uniform(sampling.seed, index) * sums[-1]
    found = int(np.searchsorted(sums, draw, side="right"))
    return int(tokens[min(found, len(tokens) - 1)])


def log_probabilities(logits: Floats, tokens: npt.NDArray[np.int32]) -> list[float]:
    """ln p of each token. logits: (T, vocab), row t before token t."""
    values = logits.astype(np.float64)
    tops = values.max(axis=1)
    if not np.isfinite(tops).all():
        _finite_maximum(logits[int(np.argmin(np.isfinite(tops)))])
    sums = np.log(np.exp(values - tops[:, None]).sum(axis=1))
    found = values[np.arange(len(tokens)), tokens] - tops - sums
    return [float(np.float32(value)) for value in found]


def _finite_maximum(logits: Floats) -> float:
    top = float(logits.max())
    if not math.isfinite(top):
        problem = "the logits have no finite maximum"
        raise ServeError(422, "E0511", "generate", problem, "reset or rewind the stream")
    return top
