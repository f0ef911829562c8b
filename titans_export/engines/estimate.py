"""Estimates an engine's memory before the build. docs/engines.md has the formula and its basis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnx import GraphProto, ModelProto

from ..onnx.initializers import tensor_bytes
from .targets import Target

MIB, GIB = 1 << 20, 1 << 30
# Allowances, not measurements: LIBRARIES for the CUDA context and the vendor's libraries, SYSTEM for the operating
# system on targets with shared memory.
LIBRARIES, SYSTEM = 512 * MIB, GIB
# PROCESS is the Python process; COPIES counts the parsed graph and the engine, per byte of weights. Measured with
# TensorRT-RTX 1.7.1, without a GPU, on graphs of 4 MiB, 256 MiB and 1 GiB of weights.
PROCESS, COPIES = 256 * MIB, 2
_LARGEST_WORKSPACE = 4 * GIB


@dataclass(frozen=True)
class Estimate:
    """Bytes. `build` is the target's memory that the build uses; 0 if the build runs on another machine."""

    weights: int  # of all graphs; each engine has its own copy
    state: int  # of one stream
    activations: int
    workspace: int
    build: int
    run: int


def default_workspace(target: Target) -> int:
    """The default limit of the builder: a quarter of the memory, at most 4 GiB."""
    return min(target.memory // 4, _LARGEST_WORKSPACE)


def estimate(target: Target, models: Iterable[ModelProto], state: int, workspace: int, here: bool) -> Estimate:
    """The estimate for graphs in their final precision. here: the build runs on the target."""
    weights, activations = [], []
    for model in models:
        weights.append(sum(tensor_bytes(tensor.dims, tensor.data_type) for tensor in model.graph.initializer))
        activations.append(live_bytes(model.graph))
    largest = max(weights, default=0)
    device = largest + state + max(activations, default=0) + workspace + LIBRARIES
    host = PROCESS + COPIES * largest + SYSTEM if target.shared_memory else 0
    run = sum(weights) + state + sum(activations) + LIBRARIES + (SYSTEM if target.shared_memory else 0)
    if not target.gpu:
        device, run = 0, sum(weights) + state + sum(activations)
    build = device + host if here and target.gpu else 0
    return Estimate(sum(weights), state, sum(activations), workspace, build, run)


def live_bytes(graph: GraphProto) -> int:
    """Peak bytes of live values, with nodes run in order. Values of unknown shape count as 0."""
    sizes = {
        value.name: tensor_bytes(
            [max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim], value.type.tensor_type.elem_type
        )
        for value in (*graph.value_info, *graph.output)
    }
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    last.update({value.name: len(graph.node) for value in graph.output})
    alive, most = 0, 0
    ending: dict[int, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            alive += sizes.get(name, 0)
            ending[last.get(name, i)] = ending.get(last.get(name, i), 0) + sizes.get(name, 0)
        most = max(most, alive)
        alive -= ending.pop(i, 0)
    return most
