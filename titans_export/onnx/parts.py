"""Traces the repeated parts of a model once each, and puts them in place of their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from ..model.exported import PARTS_DOMAIN, Part, tensors_of
from .tracing import quiet, trace_ir


class _Run(nn.Module):
    """A part whose module is a submodule, as `functional_call` requires."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.module, self.run = part.module, part.run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(self.module, *inputs)


class _Body(nn.Module):
    """A part with the tensors of its module as inputs."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part, self.hidden = part, (_Run(part),)  # in a tuple, so that the tensors are no parameters of the body

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        count = len(self.part.inputs)
        tensors = {f"module.{name}": value for name, value in zip(self.part.tensors, values[count:], strict=True)}
        outputs: tuple[Tensor, ...] = torch.func.functional_call(self.hidden[0], tensors, values[:count])
        return outputs


def uncommitted(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are read, as an example of a traced input."""
    return torch.from_numpy(np.zeros(tuple(shape), torch.empty(0, dtype=dtype).numpy().dtype))


def _function_of(part: Part) -> ir.Function:
    tensors = tensors_of(part.module)
    args = [uncommitted(shape, dtype) for shape, dtype in part.inputs]
    args += [tensors[name].detach() for name in part.tensors]
    inputs = [f"{part.name}.in{i}" for i in range(len(args))]
    outputs = [f"{part.name}.out{i}" for i in range(part.outputs)]
    model = trace_ir(_Body(part), tuple(args), inputs, outputs)
    graph = model.graph
    constants = []
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        made = ir.Value(name=name, shape=value.shape, type=value.type)
        constants.append(ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], outputs=[made]))
        value.replace_all_uses_with(made, replace_graph_outputs=True)
        del graph.initializers[name]
    graph.insert_before(graph[0], constants)
    return ir.Function(PARTS_DOMAIN, part.name, graph=graph, attributes=())


def insert_parts(model: ir.Model, parts: Iterable[Part]) -> None:
    """Replaces each node of a part by the part's own nodes, and folds what constants and equal layers permit."""
    for part in parts:
        function = _function_of(part)
        model.functions[function.identifier()] = function
    with quiet():
        common.InlinePass()(model)
        fold_constants(model, onnx_shape_inference=True)
        ir.passes.Sequential(
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)
