"""Quantised matrices: formats, and how scales are found.

A matrix is (K, N) with K input channels. Scales are symmetric: a value is its integer times the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # largest value with scale 1
_LEAST = {"int8": -127.0, "int4": -8.0, "fp8": -448.0}
_TOGETHER = 1 << 20  # values that are quantised at once
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # smaller scales overflow a division
# Clipping limits that the method mse tries, as fractions of a group's largest magnitude.
CLIPPED = tuple(1.0 - 0.025 * step for step in range(20))

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class QuantisedMatrix:
    """values (K, N): int8 for int8 and int4, the bits as uint8 for fp8.

    scales: (K / group, N), one per `group` rows of a column; (1, N) without groups.
    """

    format: str
    values: NDArray[np.int8] | NDArray[np.uint8]
    scales: Matrix
    group: int | None

    def dequantised(self) -> Matrix:
        """The float32 values (K, N) that it stands for."""
        numbers = from_fp8(self.values) if self.format == "fp8" else self.values.astype(np.float32)
        rows = self.group or len(self.values)
        result: Matrix = numbers * np.repeat(self.scales, rows, axis=0)
        return result


def to_fp8(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The e4m3 bits of values within its range, rounded to nearest even."""
    bits: NDArray[np.uint8] = (
        torch.from_numpy(values.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )
    return bits


def from_fp8(bits: NDArray[np.generic]) -> Matrix:
    """The values of e4m3 bits."""
    numbers: Matrix = torch.from_numpy(bits.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    return numbers


def scales_of(largest: NDArray[np.floating], format: str) -> Matrix:
    """Scales that map these largest magnitudes to the format's largest value; 1 for zero."""
    scales = (largest / LARGEST[format]).astype(np.float32)
    return np.where(scales < _SMALLEST_SCALE, np.float32(1.0), scales)


def round_to(values: NDArray[np.floating], scales: NDArray[np.floating], format: str) -> NDArray[np.float64]:
    """values / scales rounded to the format, as float64."""
    quotients = np.clip(values / scales, _LEAST[format], LARGEST[format])
    if format == "fp8":
        return from_fp8(to_fp8(quotients)).astype(np.float64)
    numbers: NDArray[np.float64] = np.rint(quotients).astype(np.float64)
    return numbers


def stored(numbers: NDArray[np.floating], format: str) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Rounded values in the type that stores them."""
    return to_fp8(numbers) if format == "fp8" else numbers.astype(np.int8)


def grouped(matrix: NDArray[np.floating], group: int | None) -> NDArray[np.floating]:
    """(K, N) reshaped to (groups, rows, N)."""
    rows = group or len(matrix)
    return matrix.reshape(-1, rows, matrix.shape[1])


def quantise(matrix: Matrix, format: str, group: int | None, method: str) -> QuantisedMatrix:
    """Quantises (K, N) with `method` "minmax" or "mse". K is a multiple of the group."""
    rows, columns = matrix.shape
    values = np.empty((rows, columns), np.uint8 if format == "fp8" else np.int8)
    scales = np.empty((rows // (group or rows), columns), np.float32)
    # Columns are independent. A part has at least two, as NumPy sums a single one in another order.
    step = max(2, _TOGETHER // rows)
    for begin in range(0, columns, step):
        end = begin + step if columns - begin - step > 1 else columns
        part = slice(begin, end)
        values[:, part], scales[:, part] = _quantise_columns(matrix[:, part], format, group, method)
        if end == columns:
            break
    return QuantisedMatrix(format, values, scales, group)


def _quantise_columns(
    matrix: Matrix, format: str, group: int | None, method: str
) -> tuple[NDArray[np.int8] | NDArray[np.uint8], Matrix]:
    """The values and scales of (K, N)."""
    parts = grouped(np.ascontiguousarray(matrix), group)
    largest = np.abs(parts).max(axis=1)
    scales = scales_of(largest, format)
    if method == "mse":
        scales = _least_error(parts, largest, scales, format)
    numbers = round_to(parts, scales[:, None], format).reshape(matrix.shape)
    return stored(numbers, format), scales


def _least_error(parts: NDArray[np.floating], largest: NDArray[np.floating], scales: Matrix, format: str) -> Matrix:
    """Each group's scale with the least squared error over CLIPPED. A tie keeps the wider range."""
    best = scales
    least = np.full(scales.shape, np.inf)
    for fraction in CLIPPED:
        tried = scales_of(largest * fraction, format)
        error = np.square(round_to(parts, tried[:, None], format) * tried[:, None] - parts).sum(axis=1)
        best = np.where(error < least, tried, best)
        least = np.minimum(least, error)
    return best


def pack_int4(values: NDArray[np.int8]) -> bytes:
    """Two values per byte in ONNX's order, the first in the low half."""
    flat = values.reshape(-1).astype(np.uint8) & 0x0F
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def unpack_int4(data: bytes, count: int) -> NDArray[np.int8]:
    """The inverse of `pack_int4`."""
    packed = np.frombuffer(data, np.uint8)
    halves = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8)
