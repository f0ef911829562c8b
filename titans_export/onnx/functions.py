"""Function bodies of the operators with a state, as ONNX model-local functions traced from the PyTorch references.

Runtimes without our kernels run the bodies. Only the number of streams is symbolic, so each configuration has its own.
The node's `overload` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from ..model import cached_attention, causal_convolution, chunk_neural_memory, neural_memory
from ..operators import (
    CACHED_ATTENTION,
    CAUSAL_CONVOLUTION,
    CHUNK_NEURAL_MEMORY,
    DOMAIN,
    NEURAL_MEMORY,
    OPERATORS,
    Operator,
)
from .nodes import attributes
from .streams import Numbers, free_streams
from .tracing import OPSET, trace

REFERENCES = {
    NEURAL_MEMORY.name: neural_memory.reference,
    CHUNK_NEURAL_MEMORY.name: chunk_neural_memory.reference,
    CACHED_ATTENTION.name: cached_attention.reference,
    CAUSAL_CONVOLUTION.name: causal_convolution.reference,
}
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of every input of a node


class _Body(nn.Module):
    """A reference with the inputs of one node, in order, and its first `outputs` outputs."""

    def __init__(self, reference: Callable[..., tuple[Tensor, ...]], present: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.reference, self.present, self.outputs = reference, present, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self.reference(**dict(zip(self.present, values, strict=True)))[: self.outputs]


def _example(operator: Operator, name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "learn":
        return torch.ones(shape, dtype=torch.bool)
    return torch.zeros(shape, dtype=getattr(torch, operator.dtype(name)))


def initializers_to_constants(graph: onnx.GraphProto) -> None:
    """Turns all initialisers into Constant nodes: functions have no initialisers, and inliners fail on those of
    branches.
    """
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer] + list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                initializers_to_constants(attribute.g)


@lru_cache(maxsize=64)
def _function(
    operator: Operator,
    given: tuple[tuple[str, Any], ...],
    inputs: Shapes,
    outputs: tuple[str, ...],
    numbers: Numbers | None,
) -> onnx.FunctionProto:
    """The body of one configuration. given: the node's attributes."""
    values, shapes = operator.complete(dict(given)), dict(inputs)
    present = tuple(name for name in operator.input_names if name in shapes)
    body = _Body(REFERENCES[operator.name](values, present), present, len(outputs))
    examples = tuple(_example(operator, name, shapes[name]) for name in present)
    model = trace(body, examples, present, outputs)
    if numbers is not None:
        free_streams(model, *numbers)
    graph = model.graph
    initializers_to_constants(graph)
    extras = operator.optional(present)
    if operator is CHUNK_NEURAL_MEMORY:
        extras += outputs[len(NEURAL_MEMORY.outputs) :]
    return helper.make_function(
        DOMAIN,
        operator.name,
        operator.input_names[: operator.input_names.index(present[-1]) + 1],
        outputs,
        graph.node,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=[name for name, _ in given],
        overload=operator.overload(values, _sizes(operator, shapes, numbers or ()), extras),
    )


def _sizes(operator: Operator, shapes: dict[str, tuple[int, ...]], symbolic: tuple[int, ...]) -> dict[str, int]:
    """The sizes that the attributes do not determine, by the letters of the operator's page, without symbolic ones."""
    sizes = _all_sizes(operator, shapes)
    return {letter: size for letter, size in sizes.items() if size not in symbolic}


def _all_sizes(operator: Operator, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    if operator is CACHED_ATTENTION:
        streams, _, rows, width = shapes["keys"]
        sizes = {"b": shapes["q"][0], "t": shapes["q"][1], "n": rows, "d": width}
    elif operator is CAUSAL_CONVOLUTION:
        streams = shapes["past"][0]
        sizes = {**dict(zip("btc", shapes["x"], strict=True)), "w": shapes["weight"][0]}
    else:
        return dict(zip("bht", shapes["q"], strict=False))
    return sizes | {"p": streams} if "slots" in shapes else sizes


def build_function(
    node_shapes: dict[str, tuple[int, ...]], node: onnx.NodeProto, numbers: Numbers | None = None
) -> onnx.FunctionProto:
    """The body of a node of an operator in `REFERENCES`. node_shapes: shape of every value of the graph, as traced with
    these numbers of streams and slots. Raises UsageError for unknown attributes.
    """
    operator = OPERATORS[node.op_type]
    names = zip(operator.input_names, node.input, strict=False)
    inputs = tuple((name, node_shapes[value]) for name, value in names if value)
    values = attributes(node).items()
    given = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values)
    return _function(operator, given, inputs, operator.outputs[: len(node.output)], numbers)
