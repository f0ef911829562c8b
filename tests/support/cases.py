"""Memory kinds and inputs that several tests share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor

from titans_export.model.memory import MemorySpec


def _spec(widths: tuple[int, ...], activation: str = "silu", residual: bool = False, norm: bool = False) -> MemorySpec:
    return MemorySpec(widths, activation, residual, norm, chunk_size=8)


KINDS = {
    "linear": _spec((6, 6)),
    "linear-residual-norm": _spec((6, 6), residual=True, norm=True),
    "mlp2-silu": _spec((6, 10, 6)),
    "mlp2-gelu": _spec((6, 10, 6), "gelu"),
    "mlp2-residual": _spec((6, 10, 6), residual=True),
    "mlp2-norm": _spec((6, 10, 6), norm=True),
    "mlp3-gelu-residual-norm": _spec((6, 10, 9, 6), "gelu", residual=True, norm=True),
    "mlp3-silu": _spec((6, 9, 10, 6)),
}
kinds = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS.keys())
TOLERANCE_FLOAT64 = TOLERANCES["cpu", "float64"]


@dataclass(eq=False)
class Case:
    """Random inputs of (streams, heads) in float64; `edges` puts exact 0 and 1 into every gate."""

    spec: MemorySpec
    length: int
    streams: int = 2
    heads: int = 3
    edges: bool = False
    seed: int = 0
    weights: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        lead, d = (self.streams, self.heads), self.spec.widths[0]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=draw, dtype=torch.float64)

        self.weights = [normal(*lead, i, o) * i**-0.5 for i, o in self.spec.shapes]
        self.q, self.k = (torch.nn.functional.normalize(normal(*lead, self.length, d), dim=-1) for _ in range(2))
        self.v = normal(*lead, self.length, d)
        # A LayerNorm over few, small outputs amplifies: with large steps two correct forms drift apart chaotically.
        self.step_size = (0.02 if self.spec.layer_norm else 0.1) * uniform(*lead, self.length)
        self.momentum, self.forget_gate = uniform(*lead, self.length), 0.3 * uniform(*lead, self.length)
        self.norm_scale = 1 + 0.3 * normal(self.heads, d) if self.spec.layer_norm else None
        if self.edges:
            for gate, period in ((self.step_size, 3), (self.momentum, 4), (self.forget_gate, 5)):
                gate[..., ::period] = 0.0
            self.momentum[..., 1::4] = 1.0
            self.forget_gate[..., 2::5] = 1.0

    @property
    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.step_size, self.momentum, self.forget_gate


def random_cuts(length: int, seed: int) -> list[int]:
    """Lengths that add up to `length`, some of them 0."""
    draw = random.Random(seed)
    points = sorted(draw.choices(range(length + 1), k=7))
    return [b - a for a, b in zip([0, 0, *points], [0, *points, length], strict=True)]


def worst(*pairs: tuple[Tensor, Tensor], floor: float = 1e-30) -> float:
    """The largest absolute difference of each pair, relative to its largest expected value, or to `floor` if that is
    more.
    """
    each = [(a - b).abs().max() / b.abs().max().clamp_min(floor) for a, b in pairs]
    return float(torch.stack(each).max())  # which is NaN where one is, unlike Python's max
