"""What makes exports faster changes no graph, and is gone after a trace."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from torch import Tensor, nn

from titans_export.onnx import shared_tables, tracing


class _Model(nn.Module):
    """Steps that the optimiser's rules rewrite: repeated reshapes and transposes, an addition of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.reshape(2, 2, 8).reshape(4, 8)).clamp(min=0).clamp(max=3)
        x = torch.cat([x.transpose(0, 1).transpose(0, 1)[:, :6][:, 1:5], x + 0, x * 1], dim=-1)
        chosen: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x.relu().relu(),))
        return chosen


def _traced() -> bytes:
    torch.manual_seed(0)
    graph = tracing.trace(_Model(), (torch.ones(4, 8),), ["x"], ["y"])
    return bytes(graph.SerializeToString(deterministic=True))


def _originals() -> list[object]:
    found = []
    for module, owner, name, _ in shared_tables._REPLACED:
        place = importlib.import_module(module)
        found.append(vars(getattr(place, owner) if owner else place)[name])
    return found


def test_graphs_are_the_same_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = _originals()  # a version of PyTorch or onnxscript without one of them fails here: exports got slower
    shared = [_traced(), _traced()]
    assert _originals() == originals
    monkeypatch.setattr(tracing, "shared_tables", contextlib.nullcontext)
    assert shared == [_traced()] * 2


def test_rules_are_tried_for_their_operator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = importlib.import_module("onnxscript.rewriter._rewrite_rule")
    tried, rewrite = [], rules.RewriteRule.try_rewrite

    def counted(rule: object, model: object, graph: object, node: object, **options: object) -> object:
        tried.append(rule)
        return rewrite(rule, model, graph, node, **options)

    monkeypatch.setattr(rules.RewriteRule, "try_rewrite", counted)
    _traced()
    filtered = len(tried)
    tried.clear()
    monkeypatch.setattr(tracing, "shared_tables", contextlib.nullcontext)
    _traced()
    assert 0 < filtered < len(tried) / 4
