"""Attention over a window: sliding (MAG, MAL) and segmented (MAC). Both keep their keys and values in the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cached_attention import AttentionSpec, attend, cached_attention, phase_increments
from .layers import Linear, Step, StreamState, join_heads, split_heads

ROTARY_BASE = 10000.0


class Attention(nn.Module):
    """The common base: projections, persistent tokens and rotary positions."""

    increments: Tensor

    def __init__(self, dim: int, heads: int, persistent: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        self.register_buffer("increments", phase_increments(ROTARY_BASE**-exponents)[0], persistent=False)

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

    def empty_cache(self, batch: int, rows: int) -> StreamState:
        """A cache (B, heads, persistent + rows, head_dim) of the persistent tokens' rows and empty ones."""
        empty = self.out.weight.new_zeros(batch, self.heads, rows, self.head_dim)
        keys, values = self.first_rows(batch)
        return {"keys": torch.cat([keys, empty], 2), "values": torch.cat([values, empty], 2)}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """q: (B, heads, T, head_dim); keys, values: (B, heads, N, head_dim); seen: (B, T, N) bool, with at least one
        True per token. Returns (B, T, dim).
        """
        out: Tensor = self.out(join_heads(attend(q, keys, values, seen)))
        return out


class SlidingWindowAttention(Attention):
    """Causal attention: a token sees the persistent tokens, itself, and the window - 1 tokens before it.

    keys, values in the state: (B, heads, persistent + window, head_dim): the persistent rows (constant), then a ring.
    """

    def __init__(self, dim: int, heads: int, window: int, persistent: int) -> None:
        super().__init__(dim, heads, persistent)
        self.spec = AttentionSpec(heads, window=window, persistent=persistent, rotary="halves")

    def initial_state(self, batch: int) -> StreamState:
        return self.empty_cache(batch, self.spec.window)

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """x: (B, T, dim). Returns the output and the next state."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        result = cached_attention(
            self.spec, state["keys"], state["values"], q, k, v, step.position, self.increments, slots=step.slots
        )
        return self.out(result.y), {"keys": result.keys, "values": result.values}


class SegmentAttention(Attention):
    """Attention of MAC, made causal. Within a segment, a token sees the persistent tokens, and the retrieved rows and
    the tokens up to its own place (equations 22 and 23).

    keys, values in the state: (B, heads, persistent + 2 segment, head_dim), in the order persistent rows (constant),
    retrieved rows, token rows. Rows of the previous segment stay until overwritten; no token sees them.
    """

    def __init__(self, dim: int, heads: int, segment: int, persistent: int) -> None:
        super().__init__(dim, heads, persistent)
        self.spec = AttentionSpec(
            heads, segment=segment, persistent=persistent, groups=2, rotary="halves", origin="segment"
        )

    def initial_state(self, batch: int) -> StreamState:
        return self.empty_cache(batch, 2 * self.spec.segment)

    def forward(
        self, x: Tensor, retrieved: Tensor | None, state: StreamState, step: Step
    ) -> tuple[Tensor, StreamState]:
        """x, retrieved: (B, T, dim); None for zeros. Returns y (B, T, dim) and the next state."""
        both = F.pad(x, (0, 0, x.shape[1], 0)) if retrieved is None else torch.cat([retrieved, x], 1)
        q, k, v = self.query(x), self.key(both), self.value(both)
        result = cached_attention(
            self.spec, state["keys"], state["values"], q, k, v, step.position, self.increments, slots=step.slots
        )
        return self.out(result.y), {"keys": result.keys, "values": result.values}
