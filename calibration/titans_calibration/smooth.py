"""SmoothQuant: moves outliers of a matmul's input into its weights.

A matmul x W becomes (x / s) (s W) with s_k = max|x_k|^alpha / max|W_k|^(1 - alpha) for input channel k. Matmuls that
share an input share s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FLOOR = 1e-5  # least maximum of a channel, relative to the largest


def smoothing(
    channels: NDArray[np.floating], weights: Sequence[NDArray[np.float32]], alpha: float
) -> NDArray[np.float32]:
    """s (K,) from the largest magnitude of each input channel (K,) and the (K, N) weights of the input's matmuls."""
    inputs = _floored(np.asarray(channels, np.float64))
    outputs = _floored(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64))
    factors = inputs**alpha / outputs ** (1.0 - alpha)
    centred: NDArray[np.float32] = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return centred


def _floored(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(largest, max(_FLOOR * float(largest.max(initial=0.0)), np.finfo(np.float32).tiny))
