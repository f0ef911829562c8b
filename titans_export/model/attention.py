"""Attention over a window: sliding (MAG, MAL) and segmented (MAC). Both keep their keys and values in the state."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, Step, StreamState, join_heads, split_heads

ROTARY_BASE = 10000.0
PHASE_BITS = 32


class Rotary(nn.Module):
    """Rotary positions whose phases are integer multiples of 2^-32 turns.

    Phases accumulate in integers, so the rotation stays exact at token 2,000,000,000. In float32, position * frequency
    would be off by more than a radian well before that.
    """

    increments: Tensor
    quarter: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        increments = (frequencies / (2 * math.pi) * 2**PHASE_BITS).round().to(torch.int64)
        self.register_buffer("increments", increments, persistent=False)
        # x @ quarter rotates each pair (x_i, x_{i + half}) by 90 degrees: exact, and a single node.
        half = torch.eye(head_dim // 2)
        none = torch.zeros_like(half)
        quarter = torch.cat([torch.cat([none, half], 1), torch.cat([-half, none], 1)])
        self.register_buffer("quarter", quarter, persistent=False)

    def forward(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position: (B, T) int64. Returns cos and sin of each element's angle, (B, 1, T, head_dim)."""
        phase = torch.remainder(position.unsqueeze(-1) * self.increments, 2**PHASE_BITS)
        angle = (phase.to(dtype) * (2 * math.pi / 2**PHASE_BITS)).unsqueeze(1)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, angle: tuple[Tensor, Tensor]) -> Tensor:
        """Rotates the pairs (x_i, x_{i + half}). x: (B, heads, n T, head_dim); the angles of T positions repeat n
        times.
        """
        cos, sin = angle
        times = x.shape[2] // cos.shape[2]
        if cos.shape[2] > 1 and times > 1:
            cos, sin = cos.repeat(1, 1, times, 1), sin.repeat(1, 1, times, 1)
        return x * cos + (x @ self.quarter) * sin


class Attention(nn.Module):
    """The common base: projections, persistent tokens and softmax."""

    def __init__(self, dim: int, heads: int, persistent: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        self.rotary = Rotary(self.head_dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, dim) to (B, heads, T, head_dim)."""
        return split_heads(x, self.heads)

    def first_rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens (19), each (B, heads, persistent, head_dim), not rotated."""
        if self.persistent is None:
            none = self.out.weight.new_zeros(batch, self.heads, 0, self.head_dim)
            return none, none
        rows = self.persistent.unsqueeze(0)
        keys, values = (self.split(x).expand(batch, -1, -1, -1) for x in (self.key(rows), self.value(rows)))
        return keys, values

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """q: (B, heads, T, head_dim); keys, values: (B, heads, N, head_dim); seen: (B, T, N) bool, with at least one
        True per token. Returns (B, T, dim).
        """
        if torch.compiler.is_exporting():
            # The exporter's own pattern guards against fully masked tokens, which costs two nodes per layer.
            hidden = torch.where(seen, 0.0, -math.inf).to(q.dtype).unsqueeze(1)
            scores = (q * self.head_dim**-0.5) @ keys.transpose(-1, -2) + hidden
            y = scores.softmax(-1) @ values
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.unsqueeze(1))
        out: Tensor = self.out(join_heads(y))
        return out


class SlidingWindowAttention(Attention):
    """Causal attention: a token sees itself and the window - 1 tokens before it."""

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
        q = self.rotary.rotate(self.split(self.query(x)), angle)
        keys = torch.cat([state["keys"], self.rotary.rotate(self.split(self.key(x)), angle)], 2)
        values = torch.cat([state["values"], self.split(self.value(x))], 2)
        # Row r of the keys holds the token at position + r - past.
        row = torch.arange(past + length, device=x.device)
        window = (row >= token.unsqueeze(-1)) & (row <= token.unsqueeze(-1) + past)
        real = row >= past - step.position.unsqueeze(-1)
        first_keys, first_values = self.first_rows(x.shape[0])
        seen = F.pad(window & real.unsqueeze(1), (first_keys.shape[2], 0), value=True)
        y = self.attend(q, torch.cat([first_keys, keys], 2), torch.cat([first_values, values], 2), seen)
        return y, {"keys": keys[:, :, length:], "values": values[:, :, length:]}


class SegmentAttention(Attention):
    """Attention of MAC, made causal. Within a segment, a token sees the persistent tokens, and the retrieved rows and
    the tokens up to its own place (equations 22 and 23).

    keys, values in the state: (B, heads, persistent + 2 segment, head_dim), in the order persistent rows (constant),
    retrieved rows, token rows. Rows of the previous segment stay until overwritten; the mask hides them.
    """

    def __init__(self, dim: int, heads: int, segment: int, persistent: int) -> None:
        super().__init__(dim, heads, persistent)
        self.segment, self.first = segment, persistent

    def initial_state(self, batch: int) -> StreamState:
        empty = self.out.weight.new_zeros(batch, self.heads, 2 * self.segment, self.head_dim)
        keys, values = self.first_rows(batch)
        return {"keys": torch.cat([keys, empty], 2), "values": torch.cat([values, empty], 2)}

    def forward(self, x: Tensor, retrieved: Tensor, state: StreamState, position: Tensor) -> tuple[Tensor, StreamState]:
        """x, retrieved: (B, T, dim), T one chunk or one token; position: (B,) of the first token. Returns y (B, T, dim)
        and the next state.
        """
        length = x.shape[1]
        place = torch.remainder(position, self.segment).unsqueeze(-1) + torch.arange(length, device=x.device)
        both = torch.cat([retrieved, x], 1)
        # One call rotates queries and keys together.
        rotated = self.rotary.rotate(
            torch.cat([self.split(self.key(both)), self.split(self.query(x))], 2),
            self.rotary(place, x.dtype),
        )
        new_keys, q = rotated.split([2 * length, length], 2)
        new_values = self.split(self.value(both))
        rows = torch.cat([place, place + self.segment], 1) + self.first
        index = rows[:, None, :, None].expand_as(new_keys)
        keys, values = state["keys"].scatter(2, index, new_keys), state["values"].scatter(2, index, new_values)
        # The place of each row; persistent tokens get a place that every token sees.
        places = torch.arange(self.segment, device=x.device)
        seen = F.pad(torch.cat([places, places]), (self.first, 0)) <= place.unsqueeze(-1)
        return self.attend(q, keys, values, seen), {"keys": keys, "values": values}
