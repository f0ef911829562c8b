"""Attention over a window: sliding (MAG, MAL) and by segments (MAC). Both carry their keys and values as state."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, Step, StreamState

ROTARY_BASE = 10000.0
PHASE_BITS = 32


class Rotary(nn.Module):
    """Rotary positions with phases that are whole multiples of 2^-32 turns.

    A phase accumulates in integers, so the rotation at token 2,000,000,000 is as exact as at token 0; in float32 the
    product position * frequency would be off by more than a radian long before.
    """

    increments: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        increments = (frequencies / (2 * math.pi) * 2**PHASE_BITS).round().to(torch.int64)
        self.register_buffer("increments", increments, persistent=False)

    def forward(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position: (B, T) int64. Returns cos and sin, (B, 1, T, head_dim / 2)."""
        phase = torch.remainder(position.unsqueeze(-1) * self.increments, 2**PHASE_BITS)
        angle = (phase.to(dtype) * (2 * math.pi / 2**PHASE_BITS)).unsqueeze(1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, angle: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x_i, x_{i + half}). x: (B, heads, T, head_dim)."""
    cos, sin = angle
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """What both kinds share: projections, persistent tokens, the softmax."""

    def __init__(self, dim: int, heads: int, persistent: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        self.rotary = Rotary(self.head_dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, dim) to (B, heads, T, head_dim)."""
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return heads

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """q: (B, heads, T, head_dim); keys, values: (B, heads, N, head_dim); seen: (B, T, N) bool. Returns (B, T, dim).

        Persistent tokens stand in front of the keys, are not rotated and are seen by all (equation 19).
        """
        if self.persistent is not None:
            first = self.persistent.unsqueeze(0)
            batch = q.shape[0]
            keys = torch.cat([self.split(self.key(first)).expand(batch, -1, -1, -1), keys], 2)
            values = torch.cat([self.split(self.value(first)).expand(batch, -1, -1, -1), values], 2)
            seen = F.pad(seen, (first.shape[1], 0), value=True)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.unsqueeze(1))
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class SlidingWindowAttention(Attention):
    """Causal attention in which a token sees itself and the window - 1 tokens before it."""

    def __init__(self, dim: int, heads: int, window: int, persistent: int) -> None:
        super().__init__(dim, heads, persistent)
        self.window = window

    def initial_state(self, batch: int) -> StreamState:
        empty = self.out.weight.new_zeros(batch, self.heads, self.window - 1, self.head_dim)
        return {"keys": empty, "values": empty.clone()}

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """x: (B, T, dim). Returns the output and the next state."""
        length, past = x.shape[1], self.window - 1
        token = torch.arange(length, device=x.device)
        angle = self.rotary(step.position.unsqueeze(-1) + token, x.dtype)
        q = rotate(self.split(self.query(x)), angle)
        keys = torch.cat([state["keys"], rotate(self.split(self.key(x)), angle)], 2)
        values = torch.cat([state["values"], self.split(self.value(x))], 2)
        # Row r of the keys holds the token at position + r - past.
        row = torch.arange(past + length, device=x.device)
        window = (row >= token.unsqueeze(-1)) & (row <= token.unsqueeze(-1) + past)
        real = row >= past - step.position.unsqueeze(-1)
        y = self.attend(q, keys, values, window & real.unsqueeze(1))
        return y, {"keys": keys[:, :, length:], "values": values[:, :, length:]}


class SegmentAttention(Attention):
    """Attention of MAC: within a segment, a token sees persistent tokens, and what the memory retrieved for, and the
    tokens themselves, up to its own place (equations 22 and 23, made causal).

    keys, values of the state: (B, heads, 2, segment, head_dim), the retrieved rows first, then the tokens' rows. Rows
    of the segment before stay until they are overwritten and are hidden by their place.
    """

    def __init__(self, dim: int, heads: int, segment: int, persistent: int) -> None:
        super().__init__(dim, heads, persistent)
        self.segment = segment

    def initial_state(self, batch: int) -> StreamState:
        empty = self.out.weight.new_zeros(batch, self.heads, 2, self.segment, self.head_dim)
        return {"keys": empty, "values": empty.clone()}

    def _write(self, rows: Tensor, new: Tensor, places: Tensor) -> Tensor:
        """rows with new, (B, heads, 2, T, head_dim), at `places`, (B, T)."""
        return rows.scatter(3, places[:, None, None, :, None].expand_as(new), new)

    def forward(self, x: Tensor, retrieved: Tensor, state: StreamState, position: Tensor) -> tuple[Tensor, StreamState]:
        """x, retrieved: (B, T, dim), T one chunk or one token; position: (B,) of the first. Returns y and state."""
        length = x.shape[1]
        first = torch.remainder(position, self.segment)
        places = first.unsqueeze(-1) + torch.arange(length, device=x.device)
        angle = self.rotary(places, x.dtype)
        both = torch.stack([self.split(self.key(retrieved)), self.split(self.key(x))], 2)
        cos, sin = angle
        keys = self._write(state["keys"], rotate(both, (cos.unsqueeze(2), sin.unsqueeze(2))), places)
        both = torch.stack([self.split(self.value(retrieved)), self.split(self.value(x))], 2)
        values = self._write(state["values"], both, places)
        seen = torch.arange(self.segment, device=x.device) <= places.unsqueeze(-1)
        y = self.attend(
            rotate(self.split(self.query(x)), angle),
            keys.flatten(2, 3),
            values.flatten(2, 3),
            torch.cat([seen, seen], -1),
        )
        return y, {"keys": keys, "values": values}
