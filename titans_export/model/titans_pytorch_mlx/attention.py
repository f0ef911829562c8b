"""Sliding-window attention within one segment: context and positions restart at each segment's start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import ROTARY_BASE, Attention
from ..layers import StreamState
from ..stream import StateInfo

Angle = tuple[Tensor, Tensor]


class RotaryTable(nn.Module):
    """Rotary positions of neighbouring pairs (x_0, x_1), (x_2, x_3), ..., from a table of `rows` positions.

    An angle is the float32 product of position and frequency, rounded as in the library.
    """

    angles: Tensor
    quarter: Tensor

    def __init__(self, head_dim: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("angles", torch.zeros(rows, head_dim), persistent=False)
        # x Q rotates each pair by 90 degrees: exact, and a single node.
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        self.register_buffer("quarter", torch.block_diag(*[turn] * (head_dim // 2)), persistent=False)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.set_frequencies(ROTARY_BASE**-exponents)

    def set_frequencies(self, frequencies: Tensor) -> None:
        """frequencies: (head_dim / 2,), radians per position."""
        positions = torch.arange(self.angles.shape[0], dtype=torch.float32, device=frequencies.device)
        angles = torch.outer(positions, frequencies.float())
        self.angles.copy_(angles.repeat_interleave(2, -1))

    def forward(self, position: Tensor) -> Angle:
        """position: (B, T) int64. Returns cos and sin of each element's angle, (B, 1, T, head_dim)."""
        angle = self.angles[position].unsqueeze(1)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, angle: Angle) -> Tensor:
        """x: (B, heads, T, head_dim)."""
        cos, sin = angle
        return x * cos + (x @ self.quarter) * sin


class SegmentWindowAttention(Attention):
    """A token sees the persistent tokens, itself, and the window - 1 tokens before it within its segment.

    keys, values in the state: (B, heads, ring, head_dim); the token at place p of its segment is in row p % ring.
    """

    def __init__(self, dim: int, heads: int, segment: int, window: int, persistent: int, rotary: bool) -> None:
        super().__init__(dim, heads, persistent)
        self.segment, self.window, self.first = segment, window, persistent
        # A ring shorter than a segment must divide it, because the row is computed from the position.
        self.ring = window if segment % window == 0 else segment
        # Replaces the base class's rotary positions.
        self.table = RotaryTable(self.head_dim, persistent + segment) if rotary else None

    def initial_state(self, batch: int) -> StreamState:
        if self.segment == 1:
            return {}
        empty = self.out.weight.new_zeros(batch, self.heads, self.ring, self.head_dim)
        return {"keys": empty, "values": empty.clone()}

    def state_info(self) -> dict[str, StateInfo]:
        facts = StateInfo("cache", written={"axis": 2, "first": [0], "period": self.ring})
        return dict.fromkeys(self.initial_state(1), facts)

    def _rotate(self, position: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Rotates tensors (B, heads, T, head_dim) at positions (B, T) or (1, T), which count the persistent tokens."""
        if self.table is None:
            return parts
        angle = self.table(position)
        return tuple(self.table.rotate(x, angle) for x in parts)

    def first_rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens, rotated. Their positions precede those of the segment."""
        keys, values = super().first_rows(batch)
        if self.first:
            (keys,) = self._rotate(torch.arange(self.first, device=keys.device).unsqueeze(0), keys)
        return keys, values

    def segments(self, x: Tensor) -> tuple[Tensor, StreamState]:
        """Processes whole segments, T = n C, from a segment's start. x: (B, T, dim). Returns the output and the next
        state.
        """
        batch, length, dim = x.shape
        x = x.reshape(-1, self.segment, dim)
        place = torch.arange(self.segment, device=x.device)
        q, keys = self._rotate(self.first + place.unsqueeze(0), self.split(self.query(x)), self.split(self.key(x)))
        values = self.split(self.value(x))
        first_keys, first_values = self.first_rows(x.shape[0])
        age = place.unsqueeze(-1) - place
        seen = F.pad((age >= 0) & (age < self.window), (self.first, 0), value=True).unsqueeze(0)
        y = self.attend(q, torch.cat([first_keys, keys], 2), torch.cat([first_values, values], 2), seen)
        kept = {
            name: rows.reshape(batch, -1, *rows.shape[1:])[:, -1, :, self.segment - self.ring :]
            for name, rows in (("keys", keys), ("values", values))
        }
        return y.reshape(batch, length, dim), kept if self.segment > 1 else {}

    def part(self, x: Tensor, state: StreamState, place: Tensor) -> tuple[Tensor, StreamState]:
        """Processes T tokens of one segment. place: (B,) int64, of the first token within the segment."""
        length = x.shape[1]
        token = torch.arange(length, device=x.device)
        places = place.unsqueeze(-1) + token
        q, new_keys = self._rotate(self.first + places, self.split(self.query(x)), self.split(self.key(x)))
        new_values = self.split(self.value(x))
        first_keys, first_values = self.first_rows(x.shape[0])
        # Row r of the ring holds the token `back` before place - 1, if that token is in the segment.
        row = torch.arange(self.ring, device=x.device)
        back = torch.remainder(place.unsqueeze(-1) - 1 - row, self.ring).unsqueeze(1)
        past = (back < place[:, None, None]) & (back + 1 + token.unsqueeze(-1) < self.window)
        age = token.unsqueeze(-1) - token
        new = ((age >= 0) & (age < self.window)).expand(x.shape[0], -1, -1)
        seen = F.pad(torch.cat([past, new], -1), (self.first, 0), value=True)
        keys = torch.cat([first_keys, state["keys"], new_keys], 2)
        values = torch.cat([first_values, state["values"], new_values], 2)
        y = self.attend(q, keys, values, seen)
        kept = min(length, self.ring)
        index = torch.remainder(places[:, length - kept :], self.ring)[:, None, :, None]
        index = index.expand(-1, self.heads, -1, self.head_dim)
        return y, {
            "keys": state["keys"].scatter(2, index, new_keys[:, :, length - kept :]),
            "values": state["values"].scatter(2, index, new_values[:, :, length - kept :]),
        }
