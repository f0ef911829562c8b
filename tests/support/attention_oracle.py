"""CachedAttention and CausalConvolution row by row in NumPy's float64, written from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rotate(x: Array, place: int, increments: Array, rotary: str) -> Array:
    """x: (H, D). Phases are exact integers, as Python's have any length."""
    if rotary == "none":
        return x
    turns = np.array([place * int(step) % 2**32 / 2**32 for step in increments])
    turned = np.exp(2j * math.pi * turns)
    half = x.shape[1] // 2
    a, b = (x[:, :half], x[:, half:]) if rotary == "halves" else (x[:, 0::2], x[:, 1::2])
    product = (a + 1j * b) * turned
    if rotary == "halves":
        return np.concatenate([product.real, product.imag], 1)
    return np.stack([product.real, product.imag], 2).reshape(x.shape)


def visible_rows(number: int, window: int, segment: int) -> range:
    first = 0
    if window:
        first = max(first, number - window + 1)
    if segment:
        first = max(first, number // segment * segment)
    return range(first, number + 1)


def cached_attention(
    feeds: dict[str, Array],
    heads: int,
    window: int = 0,
    segment: int = 0,
    persistent: int = 0,
    groups: int = 1,
    rotary: str = "none",
    origin: str = "stream",
) -> tuple[Array, Array, Array]:
    """y, keys and values after the call. feeds: the operator's inputs by name."""
    keys, values, q, k, v = (np.array(feeds[name], np.float64) for name in ("keys", "values", "q", "k", "v"))
    streams, tokens, _ = q.shape
    ring, extra = divmod(keys.shape[2] - persistent, groups)
    assert extra == 0
    width = keys.shape[3]
    y = np.zeros_like(q)
    for b in range(streams):
        slot = int(feeds["slots"][b]) if "slots" in feeds else b
        valid = int(feeds["valid"][b]) if "valid" in feeds else tokens
        for t in range(valid):
            number = int(feeds["position"][b]) + t
            place = number % segment if origin == "segment" else number
            rows = list(range(persistent))
            for g in range(groups):
                start = persistent + g * ring
                at = start + number % ring
                new_key = k[b, g * tokens + t].reshape(heads, width)
                keys[slot, :, at] = rotate(new_key, place, feeds.get("increments", np.zeros(0)), rotary)
                values[slot, :, at] = v[b, g * tokens + t].reshape(heads, width)
                rows += [start + j % ring for j in visible_rows(number, window, segment)]
            query = rotate(q[b, t].reshape(heads, width), place, feeds.get("increments", np.zeros(0)), rotary)
            for h in range(heads):
                scores = keys[slot, h, rows] @ query[h] / math.sqrt(width)
                weights = np.exp(scores - scores.max())
                y[b, t, h * width : (h + 1) * width] = weights @ values[slot, h, rows] / weights.sum()
    return y, keys, values


def causal_convolution(feeds: dict[str, Array], activation: str = "none") -> tuple[Array, Array]:
    """y and the past after the call."""
    past, x, weight = (np.array(feeds[name], np.float64) for name in ("past", "x", "weight"))
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        slot = int(feeds["slots"][b]) if "slots" in feeds else b
        valid = int(feeds["valid"][b]) if "valid" in feeds else x.shape[1]
        for t in range(valid):
            seen = np.concatenate([past[slot], x[b, t : t + 1]])
            y[b, t] = (seen * weight).sum(0) + feeds.get("bias", np.zeros(1)).astype(np.float64)
            if activation == "silu":
                y[b, t] *= np.exp(-np.logaddexp(0, -y[b, t]))
            past[slot] = seen[1:]
    return y, past
