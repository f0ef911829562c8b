"""The function bodies of `ai.titans::NeuralMemory`: the PyTorch reference, traced, as ONNX model-local functions.

A runtime without our kernel runs the body. Bodies have fixed shapes, so each configuration that occurs in a graph gets
one of its own, told apart by the node's `overload`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from ..errors import UsageError
from ..model.chunk_neural_memory import ChunkInputs, update_chunk_memory
from ..model.chunk_update import ChunkMemorySpec
from ..model.fast_networks import NetworkSpec
from ..model.memory import MemorySpec
from ..model.neural_memory import neural_memory_read, neural_memory_update
from ..model.node import CHUNK_OUTPUTS, DOMAIN, INPUTS, OPERATOR, OUTPUTS, attributes, chunk_attributes
from .tracing import OPSET, trace

INTEGER_INPUTS = ("fill", "valid", "slots")


class _Body(nn.Module):
    """The reference for one configuration, taking the inputs that its node has, in order."""

    def __init__(self, spec: MemorySpec, mode: str, present: tuple[str, ...]) -> None:
        super().__init__()
        self.spec, self.mode, self.present = spec, mode, present

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.present, values, strict=True))
        if self.mode == "read":
            return (neural_memory_read(self.spec, **given),)
        return tuple(neural_memory_update(self.spec, **given))


def _example(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "learn":
        return torch.ones(shape, dtype=torch.bool)
    return torch.zeros(shape, dtype=torch.int64 if name in INTEGER_INPUTS else torch.float32)


def overload(spec: MemorySpec, mode: str, aligned: bool, shape: tuple[int, ...], present: tuple[str, ...]) -> str:
    """A name that tells the configuration: `update_aligned_b1_h4_t128_w32x32_silu_c32_learn`."""
    parts = [mode] if mode == "read" else [mode, "aligned" if aligned else "any"]
    parts += [f"{letter}{size}" for letter, size in zip("bht", shape, strict=False)]
    parts += ["w" + "x".join(map(str, spec.widths)), spec.activation]
    parts += [word for word, on in (("residual", spec.residual), ("norm", spec.layer_norm)) if on]
    optional = [name for name in INPUTS[INPUTS.index("learn") :] if name in present and name != "norm_scale"]
    return "_".join([*parts, f"c{spec.chunk_size}", *optional])


def initializers_to_constants(graph: onnx.GraphProto) -> None:
    """A function has no initialisers, and inliners stumble over those of its branches: all become constant nodes."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer] + list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                initializers_to_constants(attribute.g)


Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of every input that a node has


def _function(
    body: nn.Module, shapes: Shapes, outputs: tuple[str, ...], attrs: dict[str, Any], overload: str
) -> onnx.FunctionProto:
    """The body traced with inputs of these shapes, which it takes in this order."""
    present = [name for name, _ in shapes]
    graph = trace(body, tuple(_example(name, shape) for name, shape in shapes), present, outputs).graph
    initializers_to_constants(graph)
    last = INPUTS.index(present[-1])
    return helper.make_function(
        DOMAIN,
        OPERATOR,
        INPUTS[: last + 1],
        outputs,
        graph.node,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=list(attrs),
        overload=overload,
    )


@lru_cache(maxsize=64)
def build_function(spec: MemorySpec, mode: str, aligned: bool, inputs: Shapes) -> onnx.FunctionProto:
    """The body for one configuration."""
    shapes = dict(inputs)
    present = tuple(name for name in INPUTS if name in shapes)
    return _function(
        _Body(spec, mode, present),
        tuple((name, shapes[name]) for name in present),
        OUTPUTS[mode],
        attributes(spec, mode, aligned),
        overload(spec, mode, aligned, shapes["q"], present),
    )


class _ChunkBody(nn.Module):
    """The same for a memory with one gate a chunk."""

    def __init__(self, spec: ChunkMemorySpec, aligned: bool, present: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.spec, self.aligned, self.present, self.outputs = spec, aligned, present, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Tensor] = dict(zip(self.present, values, strict=True))
        learn = given.get("learn")
        momentum = given.get("momentum")
        x = ChunkInputs(
            rows=given["state"],
            q=given["q"],
            k=given["k"],
            v=given["v"],
            step_size=given["step_size"],
            momentum=None if momentum is None else momentum.unsqueeze(-1),
            forget=given["forget_gate"],
            fill=given.get("fill"),
            learn=None if learn is None else learn.unsqueeze(-1).expand(-1, given["q"].shape[2]),
            limit=given.get("update_limit"),
            modulation=given.get("modulation"),
            previous=given.get("previous"),
            previous_gate=given.get("previous_gate"),
        )
        return tuple(update_chunk_memory(self.spec, x, self.aligned))[: self.outputs]


def chunk_overload(
    spec: ChunkMemorySpec, aligned: bool, shape: tuple[int, ...], present: tuple[str, ...], outputs: tuple[str, ...]
) -> str:
    """A name that tells the configuration: `chunks_any_b1_h4_t1_w64x128x64_gelu_residual_norm_c4_g128_...`."""
    network = spec.network
    widths = [network.width, *(network.hidden,) * (network.depth - 1), network.width]
    parts = ["chunks", "aligned" if aligned else "any"]
    parts += [f"{letter}{size}" for letter, size in zip("bht", shape, strict=False)]
    parts += ["w" + "x".join(map(str, widths)), network.activation]
    parts += [word for word, on in (("residual", network.residual), ("norm", network.norm)) if on]
    parts += [f"c{spec.chunk_size}", f"g{spec.batch_size}", f"u{spec.keys_per_token}", f"m{spec.momentum_order}"]
    parts += [f"l{spec.loss_scale!r}", *["lookahead"] * spec.lookahead]
    parts += [f"clamp{spec.grad_clamp!r}"] * bool(spec.grad_clamp) + [f"o{spec.orthogonalise}"]
    parts += [name for name in INPUTS[INPUTS.index("learn") :] if name in present]
    return "_".join([*parts, *outputs[len(OUTPUTS["update"]) :]])


@lru_cache(maxsize=64)
def build_chunk_function(
    spec: ChunkMemorySpec, aligned: bool, inputs: Shapes, outputs: tuple[str, ...]
) -> onnx.FunctionProto:
    """The body for one configuration of a memory with one gate a chunk, with the outputs that its node has."""
    shapes = dict(inputs)
    present = tuple(name for name in INPUTS if name in shapes)
    return _function(
        _ChunkBody(spec, aligned, present, len(outputs)),
        tuple((name, shapes[name]) for name in present),
        outputs,
        chunk_attributes(spec, aligned),
        chunk_overload(spec, aligned, shapes["q"], present, outputs),
    )


def _check_chunk_node(values: dict[str, Any], inputs: Shapes) -> None:
    """Raises UsageError for what the contract has and this reference has not; the exporter makes no such node."""
    absent = [name for name, _ in inputs if name in ("valid", "slots", "norm_scale")]
    odd = values["mode"] != b"update" or len(set(values["widths"][1:-1])) > 1
    if absent or odd or (values["layer_norm"] and values["norm_weight"] != b"fast"):
        got = f"one with {absent[0]}" if absent else "one with other attributes"
        raise UsageError("onnx", "a node of gates by chunk as the exporter makes it", got, "write its body by hand")


def _chunk_spec(values: dict[str, Any]) -> ChunkMemorySpec:
    widths = values["widths"]
    network = NetworkSpec(
        "mlp",
        widths[0],
        len(widths) - 1,
        widths[1],
        values["activation"].decode(),
        bool(values["residual"]),
        bool(values["layer_norm"]),
    )
    return ChunkMemorySpec(
        network,
        values["chunk_size"],
        values["batch_size"],
        values["loss_scale"],
        values["keys_per_token"],
        bool(values["lookahead"]),
        values["momentum_order"],
        None,
        values["grad_clamp"],
        values["orthogonalise"],
    )


def build_memory_function(node_shapes: dict[str, tuple[int, ...]], node: onnx.NodeProto) -> onnx.FunctionProto:
    """The body for a node, in a graph whose values have these shapes."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    inputs = tuple((name, node_shapes[value]) for name, value in zip(INPUTS, node.input, strict=False) if value)
    aligned = values["schedule"] == b"aligned"
    if values.get("gates") == b"chunk":
        _check_chunk_node(values, inputs)
        return build_chunk_function(_chunk_spec(values), aligned, inputs, CHUNK_OUTPUTS[: len(node.output)])
    spec = MemorySpec(
        tuple(values["widths"]),
        values["activation"].decode(),
        bool(values["residual"]),
        bool(values["layer_norm"]),
        values["chunk_size"],
    )
    return build_function(spec, values["mode"].decode(), aligned, inputs)
