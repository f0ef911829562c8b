"""Exports the graphs of a model's schedule: of static shapes but for the number of streams."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ..model import Call, Graph, StreamModel
from ..model.exported import collected_parts
from ..operators import CHUNK_NEURAL_MEMORY, DOMAIN, HYPER_CONNECTION
from ..safetensors_file import Array
from .functions import REFERENCES, build_function
from .hyper_connection import build_hyper_connection_function
from .mapped import check_structure
from .parameters import take_large
from .parts import insert_parts, uncommitted
from .streams import Numbers, free_streams, unlikely_numbers
from .tracing import to_proto, trace_ir

POSITION, LEARN = "position", "learn"
SLOTS_INPUT = "slots"
NEXT = ".next"


class _Call(nn.Module):
    """One call of a graph, with separate inputs and outputs for the state tensors. The slots come before them."""

    def __init__(self, model: StreamModel, names: list[str], graph: Graph) -> None:
        super().__init__()
        self.model, self.names, self.graph = model, names, graph

    def forward(self, inputs: Tensor, position: Tensor, learn: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        slots = state[0] if self.model.pools else None
        rows = state[1:] if self.model.pools else state
        call = Call(self.graph, position, learn, slots)
        outputs, following = self.model.call(inputs, dict(zip(self.names, rows, strict=True)), call)
        return outputs, *(following[name] for name in self.names)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    known = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return known


BUILDERS = {
    **dict.fromkeys(REFERENCES, build_function),
    HYPER_CONNECTION.name: build_hyper_connection_function,
}


def _attach_functions(model: onnx.ModelProto, numbers: Numbers | None) -> None:
    """Attaches a function body to every node of our operators; equal configurations share one body. numbers: see
    `free_streams`; None for a graph of one stream.
    """
    node_shapes = _shapes(model.graph)
    bodies: dict[tuple[str, str], onnx.FunctionProto] = {}
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            if node.op_type == CHUNK_NEURAL_MEMORY.name and node.output[-1] not in used:
                node.output.pop()  # initial_weights is unused, so kernels need not copy it
            body = BUILDERS[node.op_type](node_shapes, node, numbers)
            node.overload, bodies[body.name, body.overload] = body.overload, body
    model.functions.extend(bodies[name] for name in sorted(bodies))


def example_inputs(model: StreamModel, tokens: int, streams: int = 1) -> Tensor:
    """Zeros with the shape of a call of this many tokens."""
    if model.input.kind == "tokens":
        return torch.zeros(streams, tokens, dtype=torch.int64)
    return torch.zeros(streams, tokens, model.input.size)


def _unlikely_numbers(model: StreamModel, graph: Graph) -> Numbers:
    """Numbers of streams and slots that divide no dimension of the model."""
    tensors = (*model.parameters(), *model.buffers(), *model.initial_state(1).values())
    sizes = {size for tensor in tensors for size in tensor.shape}
    return unlikely_numbers(sizes | {graph.tokens, graph.stride, model.input.size, model.output.size})


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph. proto: without the large initialisers, which refer to external data at no place yet. large: their
    values by name, which share the model's memory if they are parameters.
    """

    proto: onnx.ModelProto
    large: dict[str, Array]


def trace_graph(model: StreamModel, graph: Graph) -> TracedGraph:
    """Traces one graph of the schedule. Initialisers that are parameters are named `model.` and the parameter's name.

    The graph of a model with pools takes any number of streams and slots; that of another model takes one stream.
    """
    numbers = _unlikely_numbers(model, graph) if model.pools else None
    streams, slots = numbers or (1, 1)
    state = {
        name: uncommitted((slots, *value.shape[1:]), value.dtype) for name, value in model.initial_state(1).items()
    }
    names = list(state)
    position, learn = torch.zeros(streams, dtype=torch.int64), torch.ones(streams, dtype=torch.bool)
    pool = [(SLOTS_INPUT, torch.arange(streams))] if model.pools else []
    with collected_parts() as parts:
        traced = trace_ir(
            _Call(model, names, graph),
            (
                example_inputs(model, graph.tokens, streams),
                position,
                learn,
                *(value for _, value in pool),
                *state.values(),
            ),
            [model.input.name, POSITION, LEARN, *(name for name, _ in pool), *names],
            [model.output.name, *(name + NEXT for name in names)],
        )
    if parts:
        insert_parts(traced, parts.values())
    large = take_large(traced, numbers or ())
    proto = to_proto(traced)
    _attach_functions(proto, numbers)
    if numbers is not None:
        free_streams(proto, *numbers)
    check_structure(proto)
    return TracedGraph(proto, large)


def export_graph(model: StreamModel, graph: Graph) -> onnx.ModelProto:
    """`trace_graph` with all initialisers inside the graph, for models below protobuf's limit of 2 GiB."""
    traced = trace_graph(model, graph)
    for tensor in traced.proto.graph.initializer:
        if tensor.name in traced.large:
            tensor.CopyFrom(numpy_helper.from_array(traced.large[tensor.name], tensor.name))
    return traced.proto
