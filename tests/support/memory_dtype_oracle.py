"""How low-precision memories hold W and S (docs/operator.md), by search among all that an element can hold.

Shares no code with the project. Elements are codes as PyTorch and IEEE 754 number them, which is also the order of
their magnitudes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMORY_DTYPES = ("bfloat16", "float16", "int8", "fp8")
ROUNDINGS = ("nearest", "stochastic", "error_feedback")
BLOCK = 32
LARGEST = {"int8": 127, "fp8": 448}
_DTYPES: dict[str, tuple[torch.dtype, Any, int]] = {  # and how many finite magnitudes there are
    "bfloat16": (torch.bfloat16, np.uint16, 0x7F80),
    "float16": (torch.float16, np.uint16, 0x7C00),
    "fp8": (torch.float8_e4m3fn, np.uint8, 0x7F),
}

Words = NDArray[np.uint32]


@cache
def magnitudes(memory_dtype: str) -> NDArray[np.float64]:
    """By code, and after the last what would be its successor."""
    if memory_dtype == "int8":
        return np.arange(129, dtype=np.float64)
    dtype, unsigned, count = _DTYPES[memory_dtype]
    codes = torch.from_numpy(np.arange(count, dtype=unsigned)).view(dtype)
    found = codes.double().numpy()
    return np.append(found, 2 * found[-1] - found[-2])


def flushed(x: Tensor) -> Tensor:
    """Without subnormal numbers of float32, which the CPU's kernel takes and gives as zero (docs/operator.md)."""
    return torch.where(x.abs() < 2.0**-126, torch.zeros_like(x), x)


def mix(x: Any) -> Any:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def uniforms(seed: int, head: int, tensor: int, surprise: bool, chunk_updates: int, count: int) -> NDArray[np.float64]:
    """u of the first elements of a field."""
    key = mix((mix((mix((0x9E3779B9 + seed) % 2**32) + head) % 2**32) + 2 * tensor + surprise) % 2**32)
    first = mix((key + chunk_updates) % 2**32)
    second = mix((first + key) % 2**32)
    element = np.arange(count, dtype=np.uint64)
    return (mix(mix(element ^ np.uint64(first)) ^ np.uint64(second)) >> np.uint64(8)).astype(np.float64) * 2.0**-24


@dataclass
class Elements:
    """A field: codes of magnitudes and signs (rows, columns), scales (rows, blocks) where the memory_dtype has them."""

    codes: NDArray[np.int64]
    negative: NDArray[np.bool_]
    scales: NDArray[np.float64] | None

    def values(self, memory_dtype: str) -> NDArray[np.float64]:
        table = magnitudes(memory_dtype).copy()
        if memory_dtype in ("bfloat16", "float16"):
            table[-1] = math.inf
        found = np.where(self.negative, -1.0, 1.0) * table[self.codes]
        if self.scales is None:
            return found
        return found * np.repeat(self.scales, BLOCK, -1)[:, : found.shape[1]]


def scale_of(block: NDArray[np.float32], largest: int) -> float:
    if not np.isfinite(block).all():
        return math.nan
    top = np.abs(block).max()
    if top < 2.0**-100:
        return 0.0
    exact = np.float32(top) / np.float32(largest)
    table = magnitudes("bfloat16")
    return float(table[np.searchsorted(table, np.float64(exact), "left")])


def round_field(x: NDArray[np.float32], memory_dtype: str, noise: NDArray[np.float64] | None = None) -> Elements:
    """x (rows, columns) as the row can hold it; noise: u of each element, None for the nearest."""
    assert x.dtype == np.float32
    z, scales, negative = np.abs(x), None, np.signbit(x)
    if memory_dtype in LARGEST:
        starts = range(0, x.shape[1], BLOCK)
        scales = np.array([[scale_of(row[at : at + BLOCK], LARGEST[memory_dtype]) for at in starts] for row in x])
        usable = np.isfinite(scales) & (scales > 0)
        by = np.float32(1) / np.where(usable, scales, 1).astype(np.float32)
        each = np.repeat(np.where(usable, by, np.float32(0)), BLOCK, -1)[:, : x.shape[1]]
        usable = np.repeat(usable, BLOCK, -1)[:, : x.shape[1]]
        z, negative = np.where(usable, z, np.float32(0)) * each, negative & usable
    table = magnitudes(memory_dtype)
    low = np.minimum(np.searchsorted(table, z.astype(np.float64), "right") - 1, len(table) - 2)
    share = (z.astype(np.float64) - table[low]) / (table[low + 1] - table[low])
    nearest = (share > 0.5) | ((share == 0.5) & (low % 2 == 1))
    up = nearest if noise is None else noise.reshape(x.shape) < share
    codes = low + up
    if memory_dtype in LARGEST:
        codes = np.minimum(codes, len(table) - 2)
    return Elements(codes, negative, scales)


def field_words(shape: tuple[int, ...], memory_dtype: str) -> int:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    bits = {"bfloat16": 16, "float16": 16}.get(memory_dtype, 8)
    scales = rows * math.ceil(columns / BLOCK) if memory_dtype in LARGEST else 0
    return math.ceil(rows * columns * bits / 32) + math.ceil(scales / 2)


def encode(elements: Elements, memory_dtype: str) -> Words:
    """The words of a field."""

    def to_words(codes: NDArray[Any]) -> Words:
        raw = codes.astype(codes.dtype.newbyteorder("<")).tobytes()
        return np.frombuffer(raw + bytes(-len(raw) % 4), np.uint32)

    if memory_dtype == "int8":
        signed = np.where(elements.negative, -elements.codes, elements.codes)
        codes: NDArray[Any] = signed.astype(np.int8)
    else:
        unsigned: Any = np.uint8 if memory_dtype == "fp8" else np.uint16
        sign = 0x80 if memory_dtype == "fp8" else 0x8000
        codes = (elements.codes + sign * elements.negative).astype(unsigned)
    words = to_words(codes.ravel())
    if elements.scales is None:
        return words
    scales = torch.from_numpy(elements.scales).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    scales = np.where(np.isnan(elements.scales), np.uint16(0x7FC0), scales)
    return np.concatenate([words, to_words(scales.ravel())])


def decode(words: Words, shape: tuple[int, ...], memory_dtype: str) -> NDArray[np.float64]:
    """Values of a field, by PyTorch's own types."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    count, raw = rows * columns, np.ascontiguousarray(words).tobytes()
    dtype = torch.int8 if memory_dtype == "int8" else _DTYPES[memory_dtype][0]
    values = torch.frombuffer(bytearray(raw), dtype=dtype)[:count].double().numpy().reshape(rows, columns)
    if memory_dtype in LARGEST:
        blocks, begin = math.ceil(columns / BLOCK), 4 * math.ceil(count / 4)
        scales = torch.frombuffer(bytearray(raw[begin:]), dtype=torch.bfloat16)[: rows * blocks].double().numpy()
        values = values * np.repeat(scales.reshape(rows, blocks), BLOCK, -1)[:, :columns]
    return values.reshape(shape)


@dataclass
class Kept:
    """W and S of one head as a row keeps them, tensor by tensor, with what rounding adds to them."""

    memory_dtype: str
    rounding: str
    seed: int = 0
    head: int = 0
    chunk_updates: int = 0
    fields: dict[str, Elements] = field(default_factory=dict)  # "W0", "ES1", ...
    shapes: list[torch.Size] = field(default_factory=list)

    def fresh(self, w: list[Tensor], s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Values to the nearest, their errors kept where they are."""
        self.shapes = [x.shape for x in w]
        return self._keep("W", w, noisy=False), self._keep("S", s, noisy=False)

    def begin(self, w: list[Tensor], s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What a chunk update starts from."""
        if self.rounding != "error_feedback":
            return w, s
        return self._with_errors("W", w), self._with_errors("S", s)

    def end(self, w: list[Tensor], s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What the row holds after a committed chunk update."""
        kept = self._keep("W", w), self._keep("S", s)
        self.chunk_updates += 1
        return kept

    def _with_errors(self, letter: str, values: list[Tensor]) -> list[Tensor]:
        errors = [self.values(f"E{letter}{i}").reshape(x.shape) for i, x in enumerate(values)]
        return [flushed(x.float() + e.float()).double() for x, e in zip(values, errors, strict=True)]

    def values(self, name: str) -> Tensor:
        return flushed(torch.from_numpy(self.fields[name].values(self.memory_dtype)))

    def _keep(self, letter: str, values: list[Tensor], noisy: bool = True) -> list[Tensor]:
        out = []
        for i, value in enumerate(values):
            x = flushed(value.float()).reshape(-1, value.shape[-1]).numpy()
            noise = None
            if noisy and self.rounding == "stochastic":
                noise = uniforms(self.seed, self.head, i, letter == "S", self.chunk_updates, x.size)
            self.fields[f"{letter}{i}"] = kept = round_field(x, self.memory_dtype, noise)
            stored = kept.values(self.memory_dtype)
            if self.rounding == "error_feedback":
                lost = flushed(torch.from_numpy(x - stored.astype(np.float32)))
                self.fields[f"E{letter}{i}"] = round_field(lost.numpy(), self.memory_dtype)
            out.append(torch.from_numpy(stored).reshape(value.shape))
        return out
