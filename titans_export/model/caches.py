"""Pools of streams' rows: reading the rows of a call's streams, and writing whole rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(pool: Tensor, slots: Tensor | None) -> Tensor:
    """The rows of the call's streams, (B, ...). pool: (P, ...); slots: (B,) int64, None for all rows in order."""
    return pool if slots is None else pool[slots]


def write_rows(pool: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The pool with rows (..., D) at index (..., n) int64, the coordinates of a row. Coordinates are distinct.

    Exported as a ScatterND, which copies whole rows; ScatterElements would copy single elements.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic("ScatterND", [pool, index, rows], dtype=pool.dtype, shape=pool.shape)
    return pool.index_put(tuple(index.unbind(-1)), rows)


def write_streams(pool: Tensor, slots: Tensor | None, rows: Tensor) -> Tensor:
    """The pool with the rows (B, ...) of the call's streams. slots: as in `rows_of`."""
    return rows if slots is None else write_rows(pool, slots.unsqueeze(-1), rows)


def head_rows(slots: Tensor | None, places: Tensor, heads: int) -> Tensor:
    """Coordinates for `write_rows` of cache rows (B, n) int64 in every head: (B, heads, n, 3)."""
    batch, count = places.shape
    stream = torch.arange(batch, device=places.device) if slots is None else slots
    rows = places.unsqueeze(1).expand(-1, heads, -1)
    # A sum has the streams of `places`; an expanded constant would fix their number in a graph.
    head = torch.arange(heads, device=places.device)[None, :, None] + torch.zeros_like(rows)
    return torch.stack([stream[:, None, None].expand(-1, heads, count), head, rows], -1)


def inside(valid: Tensor | None, length: int) -> Tensor | None:
    """Which of `length` rows count, (B, length) bool; None if all do. valid: (B,) int64."""
    if valid is None:
        return None
    return torch.arange(length, device=valid.device) < valid.unsqueeze(-1)


def cleared(x: Tensor, counts: Tensor | None) -> Tensor:
    """x (B, T, C) with zeros in rows that do not count. A multiplication would keep NaN, which padding may hold."""
    return x if counts is None else torch.where(counts.unsqueeze(-1), x, torch.zeros_like(x))
