"""The packed row of a memory: one row of 32-bit words per (slot, head), cut into fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import field_words
from .memory_dtype import ROW_ALIGNMENT, stored_shapes


class Field(NamedTuple):
    """A field of a packed row: words [offset, offset + words). Only float32 has one word per element."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def words(self) -> int:
        """32-bit words of the field."""
        return field_words(self.shape, self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where the fields lie in one (slot, head) row: W | S | rows of the open chunk | their coefficients | padding.

    memory_dtype, rounding: the operator's attributes. Only float32 rows can be packed and unpacked here; for
    all of them there is memory_dtype.py.
    """

    fields: tuple[Field, ...]
    size: int
    memory_dtype: str = "float32"
    rounding: str = "nearest"

    @staticmethod
    def from_shapes(
        shapes: list[tuple[str, tuple[int, ...]]], memory_dtype: str = "float32", rounding: str = "nearest"
    ) -> Layout:
        """The fields one after the other, and what the rounding adds to them."""
        fields, offset = [], 0
        for name, shape, kept in stored_shapes(shapes, memory_dtype, rounding):
            fields.append(Field(name, offset, shape, kept))
            offset += fields[-1].words
        return Layout(tuple(fields), -(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT, memory_dtype, rounding)

    def stored(self, memory_dtype: str, rounding: str = "nearest") -> Layout:
        """That of the same row in another memory_dtype, from one of memory_dtype "float32"."""
        return Layout.from_shapes([(f.name, f.shape) for f in self.fields], memory_dtype, rounding)

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """(..., R) to the fields by name, each (..., *shape)."""
        assert self.memory_dtype == "float32", "memory_dtype.unpack_row has the others"
        lead = rows.shape[:-1]
        sizes = [math.prod(f.shape) for f in self.fields]
        parts = rows.split([*sizes, self.size - sum(sizes)], -1)
        return {f.name: part.reshape(*lead, *f.shape) for f, part in zip(self.fields, parts, strict=False)}

    def pack(self, fields: dict[str, Tensor]) -> Tensor:
        """The fields, each (..., *shape), to (..., R)."""
        assert self.memory_dtype == "float32", "memory_dtype.pack_row has the others"
        first = self.fields[0]
        lead = fields[first.name].shape[: fields[first.name].dim() - len(first.shape)]
        parts = [fields[f.name].reshape(*lead, -1) for f in self.fields]
        padding = self.size - sum(math.prod(f.shape) for f in self.fields)
        if padding:
            parts.append(torch.zeros(*lead, padding, dtype=parts[0].dtype, device=parts[0].device))
        return torch.cat(parts, -1)
