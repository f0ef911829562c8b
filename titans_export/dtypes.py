"""Element types under the names of a manifest, and the size of packed memory fields in each memory dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Dtype:
    """An element type: bytes of one element, and the type's name in a safetensors header."""

    name: str
    bytes: int
    safetensors: str


# The same table as kDTypes of the runtime; a test compares the two.
DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", 4, "F32"),
        Dtype("float16", 2, "F16"),
        Dtype("bfloat16", 2, "BF16"),
        Dtype("float64", 8, "F64"),
        Dtype("int8", 1, "I8"),
        Dtype("uint8", 1, "U8"),
        Dtype("int16", 2, "I16"),
        Dtype("uint16", 2, "U16"),
        Dtype("int32", 4, "I32"),
        Dtype("uint32", 4, "U32"),
        Dtype("int64", 8, "I64"),
        Dtype("uint64", 8, "U64"),
        Dtype("bool", 1, "BOOL"),
        Dtype("float8_e4m3fn", 1, "F8_E4M3"),
    )
}

# Memory dtypes, with the largest magnitude of each. That of int8 and fp8 is relative to a block's scale.
MEMORY_DTYPES = {
    "float32": float.fromhex("0x1.fffffep127"),
    "bfloat16": float.fromhex("0x1.fep127"),
    "float16": 65504.0,
    "int8": 127.0,
    "fp8": 448.0,
}
SCALED = frozenset(("int8", "fp8"))
BLOCK = 32  # elements along a row that share a scale, in the scaled memory dtypes


class PackedField(Protocol):
    """A field of a packed memory row: `shape` elements of a memory dtype from the 32-bit word `offset` on."""

    @property
    def name(self) -> str:
        """The field's name, such as W0."""

    @property
    def offset(self) -> int:
        """Words before the field."""

    @property
    def shape(self) -> tuple[int, ...]:
        """A matrix, a vector or a number."""

    @property
    def dtype(self) -> str:
        """The memory dtype."""


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a field. A vector has one row, a number one row and one column."""
    rows, columns = (1, 1, *shape)[-2:]
    return rows, columns


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor of a manifest's dtype."""
    return math.prod(shape) * DTYPES[dtype].bytes


def field_words(shape: Sequence[int], memory_dtype: str) -> int:
    """32-bit words of a packed field: a matrix, a vector or a number."""
    rows, columns = matrix(shape)
    count = rows * columns
    if memory_dtype == "float32":
        return count
    if memory_dtype not in SCALED:
        return -(-count // 2)
    return -(-count // 4) + -(-rows * -(-columns // BLOCK) // 2)
