"""Attention of the library's transformer as a stream. The state holds a window of keys, each rotated once.

Sliding: a row sees itself and the `window` rows before it. Segmented: a row sees itself and the earlier rows of its
segment. Persistent keys and values precede every window; they are not rotated.

The state holds the persistent rows, which never change, followed by a ring buffer. Row r of the stream is at index r
modulo the ring's length, so a call writes only its own rows. The ring also has room for the rows of a one-token call,
so that writing them keeps every row that the first of them sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cached_attention import AttentionSpec, cached_attention
from ..caches import head_rows, write_rows
from ..layers import Linear, StreamState, join_heads, split_heads
from ..rounding import rest_in_use
from ..stream import StateInfo
from .memory import rms_norm
from .options import TransformerOptions
from .positions import Angle, PairRotary


@dataclass(frozen=True)
class Window:
    """Data that the attention layers of a call share when they follow the library's cached decoding.

    hidden: (B, 1, T, keys), -infinity for masked keys, else 0. The keys are the persistent ones, the ring's after
    writing `places`, and those of the call's other rows.
    places: (B, heads, n, 3), state indices of the call's first n rows.
    last_places: state indices of its last m rows, written later, if the call has more rows.
    angle: rotation of the rows.
    persistent_angle: rotation of queries against persistent keys.
    """

    hidden: Tensor
    places: Tensor
    last_places: Tensor | None
    angle: Angle
    persistent_angle: Angle


@dataclass(frozen=True)
class WindowRule:
    """Which rows each row sees, with the deviations of the library's cached decoding.

    The library decodes with positions relative to its cache. Persistent keys are not rotated, so they then see queries
    at another angle than in training. With segmented attention, the cache restarts at the prompt's end if the prompt is
    longer than a segment.

    decoded_from: the first decoded row; None: no deviations, as in training. at_once: the most rows that a one-token
    call consumes.
    """

    window: int
    sliding: bool
    persistent: int
    heads: int
    at_once: int
    decoded_from: int | None = None

    @property
    def ring(self) -> int:
        """Length of the ring buffer, in rows."""
        return self.window - (not self.sliding) + self.at_once

    @property
    def spec(self) -> AttentionSpec | None:
        """The attention without deviations; None with them, which the operator lacks."""
        if self.decoded_from is not None:
            return None
        window, segment = (self.window + 1, 0) if self.sliding else (0, self.window)
        return AttentionSpec(self.heads, window, segment, self.persistent, rotary="pairs")

    def _begin(self, rows: Tensor, start: int) -> Tensor:
        """The first row that each row sees."""
        if self.sliding:
            return (rows - self.window).clamp(min=0)
        begin = rows - torch.remainder(rows, self.window)
        if start <= self.window:
            return begin
        return torch.where(rows < start, begin, rows - torch.remainder(rows - start, self.window))

    def __call__(self, first: Tensor, count: int, rotary: PairRotary) -> Window | None:
        """The window of `count` rows from `first`, (B,) int64; None without deviations."""
        if self.decoded_from is None:
            return None
        rows = first.unsqueeze(-1) + torch.arange(count, device=first.device)
        # These rows are written before any read. They replace no row that a row of the call sees.
        early = min(count, self.at_once)
        last = first.unsqueeze(-1) + (early - 1)
        age = torch.remainder(last + torch.arange(self.ring, 0, -1, device=first.device), self.ring)
        keys = last - age
        if count > early:
            keys = torch.cat([keys, rows[:, early:]], 1)
        begin = self._begin(rows, self.decoded_from)
        # Rows before the stream's start have negative numbers, below every `begin`.
        seen = (keys.unsqueeze(1) >= begin.unsqueeze(-1)) & (keys.unsqueeze(1) <= rows.unsqueeze(-1))
        relative = rotary(torch.where(rows < self.decoded_from, rows, rows - begin))
        hidden = torch.where(seen, 0.0, -math.inf).to(rotary.quarter.dtype).unsqueeze(1)
        places = head_rows(None, self.persistent + torch.remainder(rows, self.ring), self.heads)
        late = min(count - early, self.ring)
        last_places = places[:, :, count - late :] if late else None
        return Window(F.pad(hidden, (self.persistent, 0)), places[:, :, :early], last_places, rotary(rows), relative)


class StreamAttention(nn.Module):
    """The library's SegmentedAttention. mixes: this layer mixes the first layer's values into its own."""

    def __init__(self, options: TransformerOptions, rule: WindowRule, mixes: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rule, self.mixes = options.heads, options.dim_head, rule, mixes
        self.spec = rule.spec
        inner = self.heads * self.head_dim
        self.norm = nn.Parameter(torch.ones(options.dim))
        # Queries, keys, values, and per-head logits for mixing in the first layer's values.
        self.qkv = Linear(options.dim, 3 * inner + (self.heads if mixes else 0))
        self.mix_bias = nn.Parameter(torch.zeros(self.heads)) if mixes else None
        self.out = Linear(inner, options.dim)
        self.persistent = nn.Parameter(torch.zeros(2, self.heads, options.num_persist_mem_tokens, self.head_dim))
        self.rotary = PairRotary(self.head_dim)

    def initial_state(self, batch: int) -> StreamState:
        empty = self.norm.new_zeros(batch, self.heads, self.rule.ring, self.head_dim)
        keys, values = (torch.cat([rows.expand(batch, -1, -1, -1), empty], 2) for rows in self.persistent)
        return {"keys": keys, "values": values}

    def state_info(self) -> dict[str, StateInfo]:
        written = {"axis": 2, "first": [self.rule.persistent], "period": self.rule.ring}
        return dict.fromkeys(("keys", "values"), StateInfo("cache", written=written))

    def forward(
        self,
        x: Tensor,
        state: StreamState,
        first: Tensor,
        window: Window | None,
        first_values: Tensor | None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, StreamState]:
        """x: (B, T, dim); first: (B,) int64, of the first row. Returns the output (B, T, dim), this layer's own values
        (B, T, heads, D), and the next state.
        """
        batch, length, _ = x.shape
        inner = self.heads * self.head_dim
        projected = self.qkv(rms_norm(x, self.norm))
        q, k, v, *mix = projected.split([inner] * 3 + ([] if self.mix_bias is None else [self.heads]), -1)
        own = v.reshape(batch, length, self.heads, self.head_dim)
        if self.mix_bias is not None:
            assert first_values is not None
            share = torch.sigmoid(mix[0] + self.mix_bias).unsqueeze(-1)
            v = (own + share * (first_values - own)).reshape(batch, length, inner)
        if self.spec is not None:
            increments = self.rotary.increments
            y, keys, values = cached_attention(
                self.spec,
                state["keys"],
                state["values"],
                q,
                k,
                v,
                first,
                increments,
                slots=slots,
                rest=rest_in_use(increments),
            )
        else:
            assert window is not None
            y, keys, values = self._deviating(q, k, v, state, window)
        return self.out(y), own, {"keys": keys, "values": values}

    def _deviating(
        self, q: Tensor, k: Tensor, v: Tensor, state: StreamState, window: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention with the deviations of cached decoding: y and the next keys and values."""
        plain = split_heads(q, self.heads)
        q, k = self.rotary.rotate(plain, window.angle), self.rotary.rotate(split_heads(k, self.heads), window.angle)
        keys, next_keys = self._write(state["keys"], k, window)
        values, next_values = self._write(state["values"], split_heads(v, self.heads), window)
        scores = self._scores(q, plain, keys, window) + window.hidden
        return join_heads(scores.softmax(-1) @ values), next_keys, next_values

    def _write(self, state: Tensor, new: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The rows that `Window.hidden` covers, and the next state. new: (B, heads, T, D)."""
        early = window.places.shape[2]
        state = write_rows(state, window.places, new[:, :, :early])
        if window.last_places is None:
            return state, state
        late = window.last_places.shape[2]
        following = write_rows(state, window.last_places, new[:, :, new.shape[2] - late :])
        return torch.cat([state, new[:, :, early:]], 2), following

    def _scores(self, q: Tensor, plain: Tensor, keys: Tensor, window: Window) -> Tensor:
        """Attention logits. plain: the queries before rotation."""
        scale = self.head_dim**-0.5
        count = self.persistent.shape[2]
        relative = self.rotary.rotate(plain, window.persistent_angle)
        persistent, cached = keys.split([count, keys.shape[2] - count], 2)
        parts = [(relative * scale) @ persistent.transpose(-1, -2), (q * scale) @ cached.transpose(-1, -2)]
        scores: Tensor = torch.cat(parts, -1)
        return scores
