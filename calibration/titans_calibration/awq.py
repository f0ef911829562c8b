"""AWQ: input channels with large values get finer weights.

A matmul x W becomes (x / s) Q(s W) with s_k = mean|x_k|^alpha for input channel k. A search finds the alpha with the
least output error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from titans_calibration.weights import quantise

ALPHAS = tuple(step / 20 for step in range(21))
_FLOOR = 1e-4  # least mean of a channel, relative to the largest


def output_error(
    difference: NDArray[np.floating], mean_abs: NDArray[np.floating], gram: NDArray[np.float64] | None
) -> float:
    """The squared error of x D, summed over outputs.

    Exact with the Gram matrix x^T x; without it, channels count as independent with magnitude mean|x|.
    """
    wrong = difference.astype(np.float64)
    if gram is not None:
        return float(np.einsum("kn,kn->", wrong, gram @ wrong))
    return float(np.square(np.asarray(mean_abs, np.float64)[:, None] * wrong).sum())


def awq_scales(
    mean_abs: NDArray[np.floating],
    weights: Sequence[NDArray[np.float32]],
    format: str,
    group: int | None,
    gram: NDArray[np.float64] | None = None,
) -> NDArray[np.float32]:
    """s (K,), shared by all (K, N) weights that this input is multiplied by."""
    sizes = np.asarray(mean_abs, np.float64)
    sizes = np.maximum(sizes, max(_FLOOR * float(sizes.max(initial=0.0)), np.finfo(np.float32).tiny))
    best, least = np.ones(len(sizes), np.float32), np.inf
    for alpha in ALPHAS:
        factors = sizes**alpha
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        error = 0.0
        for weight in weights:
            found = quantise(weight * factors[:, None], format, group, "minmax").dequantised() / factors[:, None]
            error += output_error(found - weight, mean_abs, gram)
        if error < least:
            best, least = factors, error
    return best
