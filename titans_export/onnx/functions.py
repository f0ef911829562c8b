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

from ..model.memory import MemorySpec
from ..model.node import DOMAIN, INPUTS, OPERATOR, OUTPUTS, attributes
from ..model.operator import neural_memory_read, neural_memory_update
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


def _initializers_to_constants(graph: onnx.GraphProto) -> None:
    """A function has no initialisers, and inliners stumble over those of its branches: all become constant nodes."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer] + list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _initializers_to_constants(attribute.g)


@lru_cache(maxsize=64)
def build_function(
    spec: MemorySpec, mode: str, aligned: bool, inputs: tuple[tuple[str, tuple[int, ...]], ...]
) -> onnx.FunctionProto:
    """The body for one configuration. `inputs` holds name and shape of every input that the node has."""
    shapes = dict(inputs)
    present = tuple(name for name in INPUTS if name in shapes)
    args = tuple(_example(name, shapes[name]) for name in present)
    graph = trace(_Body(spec, mode, present), args, present, OUTPUTS[mode]).graph
    _initializers_to_constants(graph)
    last = INPUTS.index(present[-1])
    return helper.make_function(
        DOMAIN,
        OPERATOR,
        INPUTS[: last + 1],
        OUTPUTS[mode],
        graph.node,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=list(attributes(spec, mode, aligned)),
        overload=overload(spec, mode, aligned, shapes["q"], present),
    )
