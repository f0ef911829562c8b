"""What makes exports faster changes no graph, and is gone after a trace."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
import onnx
import onnxruntime
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


def _model() -> _Model:
    torch.manual_seed(0)
    return _Model()


def _operators(graph: onnx.GraphProto) -> list[object]:
    """The operators of a graph and its branches, in order."""
    return [
        (node.op_type, [_operators(attribute.g) for attribute in node.attribute if attribute.HasField("g")])
        for node in graph.node
    ]


def _traced() -> bytes:
    graph = tracing.trace(_model(), (torch.ones(4, 8),), ["x"], ["y"])
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
    assert shared[0] == shared[1]
    monkeypatch.setattr(tracing, "shared_tables", contextlib.nullcontext)
    assert _operators(onnx.load_from_string(shared[0]).graph) == _operators(onnx.load_from_string(_traced()).graph)
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    expected = _model()(x).detach().numpy()
    (got,) = onnxruntime.InferenceSession(shared[0], providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert np.abs(got - expected).max() < 1e-6


@pytest.mark.parametrize("operation", ["in place", "to be decomposed"])
def test_a_program_that_is_not_final_is_decomposed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the exporter fails for one and writes another graph for the other."""

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().add_(1) if operation == "in place" else torch.special.logit(x.sigmoid(), 1e-6) + 1

    passes = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
    calls, decompose = [], passes.decompose_with_registry

    def counted(*given: object) -> object:
        calls.append(given)
        return decompose(*given)

    monkeypatch.setattr(passes, "decompose_with_registry", counted)
    model = tracing.trace(Steps(), (torch.ones(2, 3),), ["x"], ["y"])
    tracing.trace(nn.Tanh(), (torch.ones(2, 3),), ["x"], ["y"])  # final
    assert len(calls) == 1
    x = torch.randn(2, 3)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    assert np.abs(got - (x + 1).numpy()).max() < 1e-5


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
