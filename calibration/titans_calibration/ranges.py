"""Symmetric clipping limits from a histogram of absolute values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

_ENTROPY_BINS = 2048
_CANDIDATES = 256  # limits that `mse` tries, evenly spaced in their logarithm from the largest value to _LEAST of it
_LEAST = 1 / 32


def percentile_limit(counts: Counts, limit: float, percentile: float) -> float:
    """The limit below which `percentile` percent of the values lie, linear within a bin."""
    total = int(counts.sum())
    sums = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(total * percentile / 100, sums, np.linspace(0.0, limit, len(counts) + 1)))


def mse_limit(counts: Counts, limit: float, high: float, levels: int) -> float:
    """The limit with the least mean squared error for `levels` steps. A bin's values count as its centre."""
    width = limit / len(counts)
    used = np.flatnonzero(counts)
    centres, weights = (used + 0.5) * width, counts[used].astype(np.float64)
    candidates = high * np.geomspace(1.0, _LEAST, _CANDIDATES)
    errors = np.empty(len(candidates))
    for i, candidate in enumerate(candidates):
        step = candidate / levels
        rounded = np.minimum(np.rint(centres / step), levels) * step
        errors[i] = np.dot(weights, (centres - rounded) ** 2)
    return float(candidates[int(np.argmin(errors))])


def entropy_limit(counts: Counts, limit: float, levels: int) -> float:
    """The limit with the least KL divergence between the clipped and the quantised distribution.

    This is TensorRT's entropy calibrator: S. Migacz, 8-bit Inference with TensorRT, GTC 2017, slides 36 to 40. It uses
    2048 bins without the first, whose zeros carry no information about clipping.
    """
    parts = counts.reshape(_ENTROPY_BINS, -1) if len(counts) > _ENTROPY_BINS else counts[:, None]
    bins: NDArray[np.float64] = parts.sum(1).astype(np.float64)
    bins[0] = bins[1] if len(bins) > 1 else bins[0]
    width, groups = limit / len(bins), levels + 1
    last = int(np.flatnonzero(bins)[-1]) + 1 if bins.any() else 0
    if last <= groups:
        return last * width if last else limit
    best, chosen = np.inf, last
    for end in range(groups, last + 1):
        divergence = _divergence(bins, end, groups)
        if divergence < best:
            best, chosen = divergence, end
    return min((chosen + 0.5) * width, last * width)


def _divergence(bins: NDArray[np.float64], end: int, groups: int) -> float:
    """KL divergence of the first `end` bins, with outliers in the last, from their form in `groups` levels."""
    clipped = bins[:end].copy()
    group = np.arange(end) * groups // end
    present = clipped > 0
    sums = np.bincount(group, clipped, groups)
    members = np.bincount(group, present, groups)
    quantised = np.where(present, sums[group] / np.maximum(members[group], 1), 0.0)
    clipped[-1] += bins[end:].sum()
    if clipped[-1] > 0 and quantised[-1] == 0:
        return np.inf  # the quantised distribution is 0 where the outliers are
    present = clipped > 0
    p, q = clipped[present] / clipped.sum(), quantised[present] / quantised.sum()
    return float(np.dot(p, np.log(p / q)))
