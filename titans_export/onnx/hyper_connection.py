"""Function bodies of `ai.titans::HyperConnection`, one per configuration, as in functions.py.

Sinkhorn's iterations are a Loop. Unrolled, ONNX Runtime decodes a token a fifth faster. But TensorRT-RTX then fuses
each iteration into all later ones: a build takes 0.3 seconds for one, 5 for three, and does not end for twenty.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import Tensor, nn

from ..model.hyper_connection import Mixed, has_beta, hyper_connection_reference, normalise
from ..operators import DOMAIN, HYPER_CONNECTION
from .functions import initializers_to_constants
from .nodes import attributes
from .streams import Numbers, free_streams
from .tracing import OPSET, trace

Shapes = tuple[tuple[int, ...], ...]


class _Body(nn.Module):
    """The reference with only the first Sinkhorn iteration."""

    def forward(
        self,
        residuals: Tensor,
        projection: Tensor,
        bias: Tensor,
        branch: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Mixed:
        return hyper_connection_reference(residuals, projection, bias, branch, weight, iterations=1)


class _Iteration(nn.Module):
    """One further Sinkhorn iteration."""

    def forward(self, mix: Tensor) -> Tensor:
        return normalise(mix)


def build_hyper_connection_function(
    node_shapes: Mapping[str, tuple[int, ...]], node: onnx.NodeProto, numbers: Numbers | None = None
) -> onnx.FunctionProto:
    """The body of a node's configuration, named by the node's `overload`. node_shapes: shape of every value of the
    graph. Raises UsageError for unknown attributes.
    """
    values = HYPER_CONNECTION.complete(attributes(node))
    return _build(tuple(tuple(node_shapes[value]) for value in node.input if value), values["iterations"], numbers)


def _overload(shapes: Shapes, iterations: int, symbolic: tuple[int, ...]) -> str:
    """A name that identifies the configuration: `b1_t36_s4_d384_i20_branch_beta`."""
    parts = [f"{letter}{size}" for letter, size in zip("btsd", shapes[0], strict=True) if size not in symbolic]
    words = (("branch", len(shapes) == len(HYPER_CONNECTION.inputs)), ("beta", has_beta(shapes[0][2], shapes[1][1])))
    values = {"iterations": iterations}
    named = [entry.word(values[entry.name]) for entry in HYPER_CONNECTION.attributes]
    return "_".join([*parts, *named, *(word for word, on in words if on)])


def _add_iterations(graph: onnx.GraphProto, shape: tuple[int, ...], count: int) -> None:
    """Appends a Loop of `count` iterations after the first. shape: that of the matrices."""
    [softmax] = [node for node in graph.node if node.op_type == "Softmax"]
    [at] = [i for i, node in enumerate(graph.node) if node.op_type == "Div" and node.input[0] == softmax.output[0]]
    first = graph.node[at].output[0]
    for node in graph.node:
        node.input[:] = ["mix" if name == first else name for name in node.input]
    # Names in a subgraph must not shadow outer names.
    traced = trace(_Iteration(), (torch.zeros(shape),), ["mix"], ["mix_out"])
    body = compose.add_prefix(traced, "loop.").graph
    body.node.append(helper.make_node("Identity", ["loop.go_on"], ["loop.go_on_out"]))
    body.input.insert(0, helper.make_tensor_value_info("loop.iteration", TensorProto.INT64, []))
    body.input.insert(1, helper.make_tensor_value_info("loop.go_on", TensorProto.BOOL, []))
    body.output.insert(0, helper.make_tensor_value_info("loop.go_on_out", TensorProto.BOOL, []))
    for name, value in (("count", np.array(count)), ("go_on", np.array(True))):
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.node.insert(at + 1, helper.make_node("Loop", ["count", "go_on", first], ["mix"], body=body))


@lru_cache(maxsize=64)
def _build(shapes: Shapes, iterations: int, numbers: Numbers | None) -> onnx.FunctionProto:
    inputs, outputs = HYPER_CONNECTION.input_names[: len(shapes)], HYPER_CONNECTION.outputs
    if not has_beta(shapes[0][2], shapes[1][1]):
        outputs = outputs[:-1]
    model = trace(_Body(), tuple(torch.zeros(shape) for shape in shapes), inputs, outputs)
    graph = model.graph
    batch, tokens, streams, _ = shapes[0]
    if iterations > 1:
        _add_iterations(graph, (batch, tokens, streams, streams), iterations - 1)
    if numbers is not None:
        free_streams(model, *numbers)
    initializers_to_constants(graph)
    return helper.make_function(
        DOMAIN,
        HYPER_CONNECTION.name,
        inputs,
        outputs,
        graph.node,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=[entry.name for entry in HYPER_CONNECTION.attributes],
        overload=_overload(shapes, iterations, numbers or ()),
    )
