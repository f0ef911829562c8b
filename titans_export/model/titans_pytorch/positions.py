"""Row positions in a stream of tokens interleaved with longterm rows, and the embeddings that depend on them.

`longterm` learned rows follow every `segment` tokens. Here they are consumed together with the segment's last token. No
logits depend on that choice, and it makes every call of a graph cover the same rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cached_attention import phase_angles, phase_increments
from ..layers import Linear
from ..rounding import keep_rest, rest_in_use

Angle = tuple[Tensor, Tensor]


def quotient(x: Tensor, divisor: int) -> Tensor:
    """x // divisor for x >= 0, int64. torch.div exports as a float32 division, which is wrong from 2^24 on;
    floor_divide exports as nine nodes.
    """
    if not torch.compiler.is_exporting():
        return torch.div(x, divisor, rounding_mode="floor")
    return torch.onnx.ops.symbolic("Div", [x, torch.tensor(divisor)], dtype=x.dtype, shape=x.shape)


def first_row(position: Tensor, segment: int, longterm: int) -> Tensor:
    """The row of the token at `position`, (B,) int64; both count from 0."""
    return position if not longterm else position + longterm * quotient(position, segment)


class AxialPositions(nn.Module):
    """The library's continuous axial embedding, stored as a table: MLP(row // size) + MLP(row % size)."""

    table: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.first = Linear(1, 2 * dim, bias=True)
        self.middle = Linear(2 * dim, 2 * dim, bias=True)
        self.last = Linear(2 * dim, dim, bias=True)
        self.register_buffer("table", torch.zeros(size, dim))

    def _outer(self, index: Tensor) -> Tensor:
        """Embeds index (B, n) int64 to (B, n, dim)."""
        x = index.unsqueeze(-1).to(self.table.dtype)
        y: Tensor = self.last(F.silu(self.middle(F.silu(self.first(x)))))
        return y

    def forward(self, first: Tensor, count: int, aligned: bool) -> Tensor:
        """Embeddings of `count` rows from `first`, (B,) int64: (B, count, dim). aligned: first and count are multiples
        of size.
        """
        if aligned and count % self.size == 0:
            blocks = torch.arange(count // self.size, device=first.device)
            outer = self._outer(quotient(first, self.size).unsqueeze(-1) + blocks)
            both = outer.unsqueeze(2) + self.table
            return both.reshape(first.shape[0], count, -1)
        rows = first.unsqueeze(-1) + torch.arange(count, device=first.device)
        outer = self._outer(quotient(rows, self.size))
        return outer + self.table[torch.remainder(rows, self.size)]


class PairRotary(nn.Module):
    """Rotary positions of neighbouring pairs (x_0, x_1), (x_2, x_3), ....

    Phases are integer multiples of 2^-32 turns, so the angle at row 2,000,000,000 is as exact as at row 0.
    """

    increments: Tensor
    quarter: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("increments", torch.zeros(head_dim // 2, dtype=torch.int64), persistent=False)
        # x Q rotates each pair by 90 degrees: exact, and a single node.
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        self.register_buffer("quarter", torch.block_diag(*[turn] * (head_dim // 2)), persistent=False)

    def set_frequencies(self, frequencies: Tensor) -> None:
        """frequencies: (head_dim / 2,), radians per row."""
        increments, rest = phase_increments(frequencies)
        self.increments.copy_(increments)
        keep_rest(self.increments, rest)

    def forward(self, rows: Tensor) -> Angle:
        """rows: (B, T) int64. Returns cos and sin of each element's angle, (B, 1, T, head_dim)."""
        angle = phase_angles(rows, self.increments, self.quarter.dtype, rest_in_use(self.increments)).unsqueeze(1)
        angle = angle.repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, angle: Angle) -> Tensor:
        """x: (B, heads, T, head_dim)."""
        cos, sin = angle
        return x * cos + (x @ self.quarter) * sin
