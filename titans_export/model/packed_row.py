"""The packed row of a memory: one row of 32-bit words per (slot, head), divided into fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..manifest import LayoutField
from ..row_fields import RowField
from .memory_dtype import place_fields, stored_layout


@dataclass(frozen=True)
class Layout:
    """The fields of one (slot, head) row: W | S | rows of the open chunk | their coefficients | padding.

    memory_dtype, rounding: the operator's attributes. This class packs and unpacks float32 rows only; memory_dtype.py
    handles the others.
    """

    fields: tuple[LayoutField, ...]
    size: int
    memory_dtype: str = "float32"
    rounding: str = "nearest"

    @staticmethod
    def of(fields: Sequence[RowField], memory_dtype: str = "float32", rounding: str = "nearest") -> Layout:
        """Lays out the float32 row's fields in order, followed by those that the rounding adds."""
        return Layout(*place_fields(fields, memory_dtype, rounding), memory_dtype, rounding)

    def stored(self, memory_dtype: str, rounding: str = "nearest") -> Layout:
        """The layout of the same row in another memory dtype. Requires a float32 layout."""
        return Layout(*stored_layout(self.fields, memory_dtype, rounding), memory_dtype, rounding)

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Splits rows (..., R) into fields by name, each (..., *shape)."""
        assert self.memory_dtype == "float32", "memory_dtype.unpack_row has the others"
        lead = rows.shape[:-1]
        sizes = [math.prod(f.shape) for f in self.fields]
        parts = rows.split([*sizes, self.size - sum(sizes)], -1)
        return {f.name: part.reshape(*lead, *f.shape) for f, part in zip(self.fields, parts, strict=False)}

    def pack(self, fields: dict[str, Tensor]) -> Tensor:
        """Joins fields, each (..., *shape), to rows (..., R)."""
        assert self.memory_dtype == "float32", "memory_dtype.pack_row has the others"
        first = self.fields[0]
        lead = fields[first.name].shape[: fields[first.name].dim() - len(first.shape)]
        parts = [fields[f.name].reshape(*lead, -1) for f in self.fields]
        padding = self.size - sum(math.prod(f.shape) for f in self.fields)
        if padding:
            parts.append(torch.zeros(*lead, padding, dtype=parts[0].dtype, device=parts[0].device))
        return torch.cat(parts, -1)
