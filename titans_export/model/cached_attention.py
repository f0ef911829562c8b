"""Attention over a stream's cache of keys and values: the reference in eager mode, one `ai.titans::CachedAttention`
node when exported. docs/attention-operator.md defines the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import CACHED_ATTENTION
from . import exported
from .caches import cleared, head_rows, inside, rows_of, write_rows
from .layers import join_heads, split_heads

PHASE_BITS = 32


@dataclass(frozen=True)
class AttentionSpec:
    """The operator's attributes.

    heads: number of heads. window: row i sees rows j > i - window; 0 for no limit. segment: row i sees only rows of its
    own segment; 0 for none. At least one of the two is positive. persistent: first rows of the cache, which every row
    sees and none overwrites. groups: rings of keys and values, written side by side. rotary: "none", "halves" (pairs
    x_d, x_{d + D/2}) or "pairs" (x_{2d}, x_{2d+1}). origin: a row's angle is that of its number ("stream") or of its
    place in the segment ("segment").
    """

    heads: int
    window: int = 0
    segment: int = 0
    persistent: int = 0
    groups: int = 1
    rotary: str = "none"
    origin: str = "stream"

    @property
    def reach(self) -> int:
        """The most rows of a group that a row sees: the fewest that a ring holds."""
        return min(size for size in (self.window, self.segment) if size)

    def ring(self, rows: int) -> int:
        """Rows per ring of a cache with this many rows."""
        return (rows - self.persistent) // self.groups


class Attended(NamedTuple):
    """y (B, T, heads D), and the next pools of keys and values, (P, heads, N, D)."""

    y: Tensor
    keys: Tensor
    values: Tensor


def phase_increments(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Phases per row as whole multiples of 2^-32 turns, int64, and what rounding took away, float64.

    frequencies: radians per row. Phases accumulate in integers, so the rotation stays exact at row 2,000,000,000. In
    float32, row * frequency would be off by more than a radian well before that.
    """
    turns = frequencies.double() / (2 * math.pi) * 2**PHASE_BITS
    return turns.round().to(torch.int64), turns - turns.round()


def phase_angles(places: Tensor, increments: Tensor, dtype: torch.dtype, rest: Tensor | None = None) -> Tensor:
    """Angles of places (B, T) int64 in radians, (B, T, D / 2). rest: what rounding took away from the increments."""
    phase = torch.remainder(places.unsqueeze(-1) * increments, 2**PHASE_BITS).to(dtype)
    if rest is not None:
        phase = phase + places.unsqueeze(-1) * rest
    angles: Tensor = phase * (2 * math.pi / 2**PHASE_BITS)
    return angles


def rotate(x: Tensor, angles: Tensor, rotary: str) -> Tensor:
    """Rotates the pairs of x (B, heads, T, D) by angles (B, T, D / 2)."""
    pairs = (-1, 2) if rotary == "pairs" else (2, -1)
    axis = -1 if rotary == "pairs" else -2
    a, b = x.reshape(*x.shape[:-1], *pairs).unbind(axis)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(x.shape)


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """softmax(q keys^T / sqrt(D)) values over the keys that each row sees.

    q: (B, heads, T, D); keys, values: (B, heads, N, D); seen: (B, T, N) bool. Returns (B, heads, T, D).
    """
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.unsqueeze(1))
    # The exporter's own pattern guards against rows that see nothing, which costs two nodes.
    hidden = torch.where(seen, 0.0, -math.inf).to(q.dtype).unsqueeze(1)
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2) + hidden
    y: Tensor = scores.softmax(-1) @ values
    return y


def cached_attention_reference(
    spec: AttentionSpec,
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    increments: Tensor | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    rest: Tensor | None = None,
) -> Attended:
    """The reference, computed in the dtype of the inputs. rest: makes the angles exact, as in `phase_angles`."""
    length, ring = q.shape[1], spec.ring(keys.shape[2])
    rows = position.unsqueeze(-1) + torch.arange(length, device=q.device)
    counts = inside(valid, length)
    every = None if counts is None else counts.repeat(1, spec.groups)
    q = split_heads(cleared(q, counts), spec.heads)
    k, v = (split_heads(cleared(x, every), spec.heads) for x in (k, v))
    if spec.rotary != "none":
        assert increments is not None
        places = torch.remainder(rows, spec.segment) if spec.origin == "segment" else rows
        angles = phase_angles(places, increments, q.dtype, rest)
        q = rotate(q, angles, spec.rotary)
        k = rotate(k, angles.repeat(1, spec.groups, 1), spec.rotary)
    write = _Write(spec, ring, position, length, valid, slots)
    # If the call overwrites no row that one of its rows sees, writing first saves a copy of the cache.
    first = length <= ring - spec.reach + 1
    last = position - 1
    if first:
        last = last + (length if valid is None else valid)
    age = torch.remainder(last.unsqueeze(-1) + torch.arange(ring, 0, -1, device=q.device), ring)
    numbers = (last.unsqueeze(-1) - age).repeat(1, spec.groups)
    next_keys, next_values = write(keys, k), write(values, v)
    if first:
        seen_keys, seen_values = rows_of(next_keys, slots), rows_of(next_values, slots)
    else:
        seen_keys = torch.cat([rows_of(keys, slots), k], 2)
        seen_values = torch.cat([rows_of(values, slots), v], 2)
        numbers = torch.cat([numbers, rows.repeat(1, spec.groups)], 1)
    seen = F.pad(_admitted(spec, rows, numbers), (spec.persistent, 0), value=True)
    y = cleared(join_heads(attend(q, seen_keys, seen_values, seen)), counts)
    return Attended(y, next_keys, next_values)


def _admitted(spec: AttentionSpec, rows: Tensor, numbers: Tensor) -> Tensor:
    """Which of the rows `numbers` (B, n) each of `rows` (B, T) sees: (B, T, n). Negative numbers are no rows."""
    begin = rows - torch.remainder(rows, spec.segment) if spec.segment else torch.zeros_like(rows)
    begin = torch.maximum(begin, rows - (spec.window - 1)) if spec.window else begin
    numbers = numbers.unsqueeze(1)
    return (numbers >= begin.unsqueeze(-1)) & (numbers <= rows.unsqueeze(-1))


class _Write:
    """Writes the last rows of a call that count into the rings of its streams."""

    def __init__(
        self,
        spec: AttentionSpec,
        ring: int,
        position: Tensor,
        length: int,
        valid: Tensor | None,
        slots: Tensor | None,
    ) -> None:
        self.spec, self.slots, self.count = spec, slots, min(length, ring)
        end = length if valid is None else valid.unsqueeze(-1)
        # The call's row of each row to write. A negative one writes what is there.
        self.call_rows = torch.arange(self.count, device=position.device) + (end - self.count)
        self.partial = valid is not None
        places = torch.remainder(position.unsqueeze(-1) + (self.call_rows + ring), ring)
        groups = [places + (spec.persistent + group * ring) for group in range(spec.groups)]
        self.places = torch.cat(groups, 1)
        self.index = head_rows(slots, self.places, spec.heads)

    def __call__(self, pool: Tensor, new: Tensor) -> Tensor:
        """The pool after writing rows of new, (B, heads, groups T, D)."""
        groups = new.chunk(self.spec.groups, 2)
        if not self.partial:
            skipped = groups[0].shape[2] - self.count
            return write_rows(pool, self.index, torch.cat([x[:, :, skipped:] for x in groups], 2) if skipped else new)
        width = new.shape[1], new.shape[3]
        taken = self._along(self.call_rows.clamp(min=0), *width)
        rows = torch.cat([x.gather(2, taken) for x in groups], 2)
        old = rows_of(pool, self.slots).gather(2, self._along(self.places, *width))
        real = (self.call_rows >= 0).repeat(1, self.spec.groups)
        return write_rows(pool, self.index, torch.where(real[:, None, :, None], rows, old))

    @staticmethod
    def _along(index: Tensor, heads: int, width: int) -> Tensor:
        """(B, n) as an index of rows in (B, heads, N, width)."""
        return index[:, None, :, None].expand(-1, heads, -1, width)


def attributes(spec: AttentionSpec) -> dict[str, Any]:
    """The node's attributes."""
    return asdict(spec)


def cached_attention(
    spec: AttentionSpec,
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    increments: Tensor | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    rest: Tensor | None = None,
) -> Attended:
    """Attends and writes the cache: the reference, or a node while exporting.

    keys, values: (P, heads, N, D), pools with one row per slot; a row has `persistent` rows, then a ring per group. q:
    (B, T, heads D), not rotated; k, v: (B, groups T, heads D), group by group. position: (B,) int64, the number of the
    first row. increments: (D / 2,) int64, with rotary. valid: (B,) int64, the rows that count; None for T. slots: (B,)
    int64, distinct, the row of each stream in the pools; None for 0..B-1, with P = B. rest: for the reference only.
    """
    if not torch.compiler.is_exporting():
        return cached_attention_reference(spec, keys, values, q, k, v, position, increments, valid, slots, rest)
    inputs = {
        "keys": keys,
        "values": values,
        "q": q,
        "k": k,
        "v": v,
        "position": position,
        "increments": increments,
        "valid": valid,
        "slots": slots,
    }
    shapes = (q.shape, keys.shape, values.shape)
    return Attended(*exported.node(CACHED_ATTENTION, attributes(spec), inputs, shapes))


def reference(values: Mapping[str, Any], present: Collection[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of its inputs by name. `values` has all attributes."""
    spec = AttentionSpec(**values)
    return lambda **inputs: tuple(cached_attention_reference(spec, **inputs))
