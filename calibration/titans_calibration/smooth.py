"""SmoothQuant: outlier channels of a matmul's input moved into its weights, where each channel can have its own scale.

A matmul x W becomes (x / s) (s W). Of channel k, s is max|x_k|^alpha / max|W_k|^(1 - alpha), over all matmuls of one
input together, as that input has one s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FLOOR = 1e-5  # of a channel that is always zero, relative to the largest


def smoothing(
    channels: NDArray[np.floating], weights: Sequence[NDArray[np.float32]], alpha: float
) -> NDArray[np.float32]:
    """s (K,), of the largest magnitude of each input channel and all (K, N) weights that this input meets."""
    inputs = _floored(np.asarray(channels, np.float64))
    outputs = _floored(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64))
    factors = inputs**alpha / outputs ** (1.0 - alpha)
    centred: NDArray[np.float32] = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return centred


def _floored(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(largest, max(_FLOOR * float(largest.max(initial=0.0)), np.finfo(np.float32).tiny))
