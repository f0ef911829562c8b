"""The operators that own a cache, in float64 NumPy: row by row, as their pages define them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rotated(x: Array, place: int, increments: Array, rotary: str) -> Array:
    """x (..., D) at an angle of a place. Phases are Python's whole numbers."""
    if rotary == "none":
        return x
    turns = np.array([place * int(increment) % 2**32 for increment in increments], np.float64) / 2**32
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    half = x.shape[-1] // 2
    first = slice(0, half) if rotary == "halves" else slice(0, None, 2)
    second = slice(half, None) if rotary == "halves" else slice(1, None, 2)
    y = np.empty_like(x)
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def attention(
    keys: Array,
    values: Array,
    q: Array,
    k: Array,
    v: Array,
    position: Array,
    increments: Array | None = None,
    valid: Array | None = None,
    slots: Array | None = None,
    *,
    heads: int,
    window: int = 0,
    segment: int = 0,
    persistent: int = 0,
    groups: int = 1,
    rotary: str = "none",
    origin: str = "stream",
) -> list[Array]:
    """y and the next pools of CachedAttention."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    batch, length, inner = q.shape
    width, ring = inner // heads, (keys.shape[2] - persistent) // groups
    y = np.zeros((batch, length, heads, width))
    q, k, v = (x.astype(np.float64).reshape(batch, -1, heads, width) for x in (q, k, v))
    for b in range(batch):
        slot = b if slots is None else int(slots[b])
        for t in range(length if valid is None else int(valid[b])):
            row = int(position[b]) + t
            place = row % segment if origin == "segment" else row
            for group in range(groups):
                at = persistent + group * ring + row % ring
                keys[slot, :, at] = rotated(k[b, group * length + t], place, increments, rotary)
                values[slot, :, at] = v[b, group * length + t]
            seen = list(range(persistent))
            for group in range(groups):
                first = max(0, row - window + 1 if window else 0, row - row % segment if segment else 0)
                seen += [persistent + group * ring + j % ring for j in range(first, row + 1)]
            query = rotated(q[b, t], place, increments, rotary)
            scores = np.einsum("hd,hnd->hn", query, keys[slot][:, seen]) / np.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y[b, t] = np.einsum("hn,hnd->hd", weights, values[slot][:, seen])
    return [y.reshape(batch, length, inner), keys, values]


def convolution(
    past: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    valid: Array | None = None,
    slots: Array | None = None,
) -> list[Array]:
    """y and the next pool of CausalConvolution."""
    past, y = past.astype(np.float64), np.zeros(x.shape, np.float64)
    for b in range(x.shape[0]):
        slot = b if slots is None else int(slots[b])
        for t in range(x.shape[1] if valid is None else int(valid[b])):
            rows = np.concatenate([past[slot], x[b, t : t + 1].astype(np.float64)])
            y[b, t] = (rows * weight).sum(0) + (0 if bias is None else bias)
            past[slot] = rows[1:]
    return [y, past]
