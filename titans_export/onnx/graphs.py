"""The static graphs of a model's schedule."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from ..model import Step, Titans
from ..model.memory import MemorySpec
from ..model.node import DOMAIN, INPUTS, OPERATOR
from .functions import build_function
from .tracing import trace

TOKENS, POSITION, LEARN, LOGITS = "tokens", "position", "learn", "logits"
NEXT = ".next"


@dataclass(frozen=True)
class Graph:
    """A graph of the schedule: it consumes `tokens` tokens where position % align == 0."""

    name: str
    tokens: int
    align: int


def schedule(model: Titans, chunks_per_call: int) -> list[Graph]:
    """Prefill by `chunks_per_call` chunks, by one chunk, and decoding by one token."""
    chunk = model.config.memory.chunk
    graphs = [Graph("decode", 1, 1)]
    if chunk > 1:
        graphs.insert(0, Graph("chunk", chunk, chunk))
    if chunks_per_call > 1:
        graphs.insert(0, Graph("prefill", chunks_per_call * chunk, chunk))
    return graphs


class _Call(nn.Module):
    """One call of a graph with the state as separate inputs and outputs."""

    def __init__(self, model: Titans, names: list[str], aligned: bool) -> None:
        super().__init__()
        self.model, self.names, self.aligned = model, names, aligned

    def forward(self, tokens: Tensor, position: Tensor, learn: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        step = Step(position, learn, self.aligned)
        logits, following = self.model.step(tokens, dict(zip(self.names, state, strict=True)), step)
        return logits, *(following[name] for name in self.names)


def _specs(node: onnx.NodeProto) -> tuple[MemorySpec, str, bool]:
    """What a node's attributes say: the memory, the mode and whether its schedule is aligned."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    spec = MemorySpec(
        tuple(values["widths"]),
        values["activation"].decode(),
        bool(values["residual"]),
        bool(values["layer_norm"]),
        values["chunk_size"],
    )
    return spec, values["mode"].decode(), values["schedule"] == b"aligned"


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    known = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return known


def _attach_functions(model: onnx.ModelProto) -> None:
    """Gives every NeuralMemory node of the model the function body of its configuration, each body once."""
    node_shapes = _shapes(model.graph)
    bodies: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type != OPERATOR:
            continue
        spec, mode, aligned = _specs(node)
        inputs = tuple((name, node_shapes[value]) for name, value in zip(INPUTS, node.input, strict=False) if value)
        body = build_function(spec, mode, aligned, inputs)
        node.overload, bodies[body.overload] = body.overload, body
    model.functions.extend(bodies[name] for name in sorted(bodies))


def export_graph(model: Titans, graph: Graph) -> onnx.ModelProto:
    """One graph of the schedule, for one stream, its initialisers inside, named `model.` and the parameter's name."""
    state = model.initial_state(1)
    names = list(state)
    tokens = torch.zeros(1, graph.tokens, dtype=torch.int64)
    position, learn = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    proto = trace(
        _Call(model, names, aligned=graph.tokens > 1),
        (tokens, position, learn, *(value.detach().clone() for value in state.values())),
        [TOKENS, POSITION, LEARN, *names],
        [LOGITS, *(name + NEXT for name in names)],
    )
    _attach_functions(proto)
    onnx.checker.check_model(proto)
    return proto
