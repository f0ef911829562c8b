"""Steps of a traced loop see sizes as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from titans_export.model import exported
from titans_export.onnx.tracing import trace


class Sums(nn.Module):
    def forward(self, start: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        def step(carry: list[Tensor], given: list[Tensor], _: int) -> tuple[list[Tensor], list[Tensor]]:
            new = carry[0] + given[0].mean(1, keepdim=True)
            return [new], [new * 2]

        (last,), (all_sums,) = exported.scan(step, [start], [values])
        return last, all_sums


def test_no_size_of_a_step_becomes_a_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """With symbols, torch compares a size of one with itself and at times finds a difference."""
    symbols: list[str] = []
    create = ShapeEnv.create_symbol

    def record(self: ShapeEnv, value: int, source: Any, *args: Any, **options: Any) -> Any:
        size = create(self, value, source, *args, **options)
        if not size.is_number:
            symbols.append(source.name)
        return size

    monkeypatch.setattr(ShapeEnv, "create_symbol", record)
    for shape in ((7, 1, 9), (5, 1, 4)):
        model = trace(Sums(), (torch.zeros(shape), torch.zeros(3, *shape)), ["start", "values"], ["last", "sums"])
        assert [node.op_type for node in model.graph.node] == ["Scan"]
    assert not symbols
