"""GPTQ: rounds one input channel after another; later channels compensate for each rounding error.

H = x^T x is the Gram matrix of the inputs, and U the upper Cholesky factor of H's inverse. If rounding changes channel
k by e, channel j > k changes by -e U_kj / U_kk. This minimises the squared error of the output.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from titans_calibration.weights import QuantisedMatrix, round_to, scales_of, stored

DAMPING = 0.01  # added to H's diagonal, relative to its mean
COLUMNS = 1024  # columns whose float64 copy is in memory at a time
BLOCK = 128  # channels whose corrections are applied to later channels together
INNER = 16  # of these, channels whose corrections are applied to the rest of the block together


def gptq(matrix: NDArray[np.float32], gram: NDArray[np.float64], format: str, group: int | None) -> QuantisedMatrix:
    """Quantises the (K, N) matrix. Each group's scale comes from its range after the corrections so far."""
    factor = _inverse_factor(gram)
    rows, columns = matrix.shape
    values = np.empty((rows, columns), np.uint8 if format == "fp8" else np.int8)
    scales = np.empty((rows // group if group else 1, columns), np.float32)
    for begin in range(0, columns, COLUMNS):  # columns are independent
        part = slice(begin, begin + COLUMNS)
        values[:, part], scales[:, part] = _columns(matrix[:, part], factor, format, group)
    return QuantisedMatrix(format, values, scales, group)


def _columns(
    matrix: NDArray[np.float32], factor: NDArray[np.float64], format: str, group: int | None
) -> tuple[NDArray[np.int8] | NDArray[np.uint8], NDArray[np.float32]]:
    """The values and scales of (K, N)."""
    work = matrix.astype(np.float64)
    rows, columns = work.shape
    values = np.empty((rows, columns), np.uint8 if format == "fp8" else np.int8)
    scales = np.zeros((rows // group if group else 1, columns), np.float32)
    if group is None:
        scales[0] = scales_of(np.abs(work).max(axis=0), format)
    inner = math.gcd(INNER, group) if group else INNER  # so that a group begins with corrected rows
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        errors = np.zeros((end - begin, columns))
        for row in range(begin, end):
            last = min(row - (row - begin) % inner + inner, end)
            if group is not None and row % group == 0:
                ahead = work[row : row + group]
                if row + group > end:  # rows beyond this block have not been corrected by it yet
                    ahead = ahead.copy()
                    ahead[end - row :] -= factor[begin:row, end : row + group].T @ errors[: row - begin]
                scales[row // group] = scales_of(np.abs(ahead).max(axis=0), format)
            scale = scales[row // group if group else 0].astype(np.float64)
            numbers = round_to(work[row], scale, format)
            values[row] = stored(numbers, format)
            errors[row - begin] = (work[row] - numbers * scale) / factor[row, row]
            work[row:last] -= np.outer(factor[row, row:last], errors[row - begin])
            if row + 1 == last < end:
                first = begin + (row - begin) // inner * inner
                work[last:end] -= factor[first:last, last:end].T @ errors[first - begin : last - begin]
        work[end:] -= factor[begin:end, end:].T @ errors
    return values, scales


def _inverse_factor(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """U, upper triangular, with U^T U = (H + damping)^-1."""
    damped = np.array(gram, np.float64)
    diagonal = np.diagonal(damped)
    damped[np.diag_indices_from(damped)] += max(DAMPING * float(diagonal.mean()), np.finfo(np.float32).tiny)
    # With both axes reversed the Cholesky factor R of H = R R^T is upper triangular, and U is its inverse.
    return _inverse_upper(np.asarray(np.linalg.cholesky(damped[::-1, ::-1]), np.float64)[::-1, ::-1])


def _inverse_upper(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of an upper triangular matrix, by halves."""
    size = len(matrix)
    if size <= BLOCK:
        return np.triu(np.linalg.inv(matrix))
    half = size // 2
    result = np.zeros_like(matrix)
    result[:half, :half] = first = _inverse_upper(matrix[:half, :half])
    result[half:, half:] = second = _inverse_upper(matrix[half:, half:])
    result[:half, half:] = -(first @ matrix[:half, half:]) @ second
    return result
