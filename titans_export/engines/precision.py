"""Lowers the matmuls of a graph to float16 or bfloat16.

The matmuls outside the memory account for most of a model's bytes and time. Norms, softmax, residuals, the state and
the memory's mathematics stay float32. A graph's inputs and outputs stay float32 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..errors import TitansError
from ..onnx.initializers import ELEMENT_TYPES, drop_unread, float_tensor, initializers_of
from ..onnx.mapped import Spill, array_of
from ..onnx.nodes import copy_model, copy_node, is_memory, makers_of, node_reads, replace_nodes
from .graphs import has_kernel
from .targets import BF16, FP16, FP32

_FORMATS = {FP32: "float32", FP16: "float16", BF16: "bfloat16"}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_QUERY, _VALUE = 1, 3  # indices of q and v among a memory's inputs; k lies between
_SCALE_ERROR = 0.01  # bfloat16 represents any number to 0.4 %
_LARGEST = {FP16: 65504.0, BF16: 3.3895313892515355e38}


class PrecisionError(TitansError):
    """Weights that the precision cannot represent."""


def lower_precision(model: ModelProto, precision: str, memory: bool, spill: Spill | None = None) -> ModelProto:
    """The graph in the precision. `memory` also lowers the memory's q, k, v and y, as our plugin requires.

    The model's weights are inside or mapped. spill: where large new weights go; None keeps them inside. Raises
    PrecisionError if a weight is out of range.
    """
    result = copy_model(model)
    if precision != FP32:
        _Pass(result.graph, precision, spill).run(memory)
    return result


class _Pass:
    def __init__(self, graph: GraphProto, precision: str, spill: Spill | None) -> None:
        self.spill = spill
        self.graph, self.precision, self.element = graph, precision, ELEMENT_TYPES[_FORMATS[precision]]
        self.weights = initializers_of(graph)
        self.types = {value.name: value.type.tensor_type.elem_type for value in _values(graph)}
        self.types.update({name: tensor.data_type for name, tensor in self.weights.items()})
        self.makers = makers_of(graph)
        self.has_nodes = any(map(is_memory, graph.node))
        self.low: dict[str, str] = {}  # float32 value to its low-precision copy
        self.nodes: list[NodeProto] = []

    def run(self, memory: bool) -> None:
        for node in list(self.graph.node):
            if memory and has_kernel(node):
                last = min(_VALUE, len(node.input) - 1)
                self._convert(node, [i for i in range(_QUERY, last + 1) if node.input[i]])
            elif node.op_type in _PRODUCTS and node.domain == "" and self._is_float32(node) and self._outside(node):
                self._convert(node, [i for i, name in enumerate(node.input) if name])
            else:
                self.nodes.append(node)
        unused = self._unused()
        replace_nodes(self.graph, [node for node in self.nodes if node.output[0] not in unused])
        drop_unread(self.graph)

    def _outside(self, node: NodeProto) -> bool:
        """Whether the matmul is outside the memory. If the memory is inlined, only matmuls with weights are known to
        be.
        """
        return self.has_nodes or any(self._is_weight(name) for name in node.input)

    def _is_weight(self, name: str) -> bool:
        """Whether the value is a weight, either directly or after a cast or dequantisation."""
        maker = self.makers.get(name)
        decoded = maker is not None and maker.op_type in ("Cast", "DequantizeLinear") and maker.input[0] in self.weights
        return name in self.weights or decoded

    def _is_float32(self, node: NodeProto) -> bool:
        """Whether all inputs are float32; those of unknown type count as float32."""
        return all(self.types.get(name, TensorProto.FLOAT) == TensorProto.FLOAT for name in node.input if name)

    def _convert(self, node: NodeProto, places: list[int]) -> None:
        """Casts the inputs at `places` down, and the first output back up under its old name."""
        for i in places:
            node.input[i] = self._lowered(node.input[i])
        name = node.output[0]
        node.output[0] = f"{name}.{self.precision}"
        self.nodes.append(node)
        self.nodes.append(_cast(node.output[0], name, TensorProto.FLOAT))

    def _lowered(self, name: str) -> str:
        if name not in self.low:
            self.low[name] = f"{name}.{self.precision}"
            maker = self.makers.get(name)
            if name in self.weights:
                self.graph.initializer.append(self._weight(self.weights[name], self.low[name]))
            elif maker is not None and maker.op_type == "DequantizeLinear" and maker.input[1] in self.weights:
                self._dequantise(maker, self.low[name])
            elif maker is not None and maker.op_type == "Cast" and self._stored(maker.input[0]):
                self.low[name] = maker.input[0]
            else:
                self.nodes.append(_cast(name, self.low[name], self.element))
        return self.low[name]

    def _stored(self, name: str) -> bool:
        """Whether the value is a weight that already has the type."""
        return name in self.weights and self.weights[name].data_type == self.element

    def _dequantise(self, node: NodeProto, target: str) -> None:
        """Dequantises directly to the type, with scales of that type. A cast in between would hide the quantised matmul
        from compilers.
        """
        scale = self.weights[node.input[1]]
        name = f"{scale.name}.{self.precision}"
        if name not in self.weights:
            lowered = self._weight(scale, name)
            self._check_scale(scale, lowered)
            self.weights[name] = lowered
            self.graph.initializer.append(lowered)
        copy = copy_node(node)
        copy.input[1], copy.output[0], copy.name = name, target, f"dequantise:{target}"
        self.nodes.append(copy)

    def _check_scale(self, scale: TensorProto, lowered: TensorProto) -> None:
        right = array_of(scale).astype(np.float64)
        found = array_of(lowered).astype(np.float64)
        worst = float(np.max(np.abs(found - right) / np.abs(right), initial=0.0))
        if not worst <= _SCALE_ERROR:
            raise PrecisionError(
                "E0661",
                "build",
                f"{self.precision} is too coarse for the scales in {scale.name}: expected an error of at most "
                f"{_SCALE_ERROR:.0%}, got {worst:.1%} for {np.abs(right).min():.3g}",
                f"give --precision {BF16 if self.precision == FP16 else FP32}",
            )

    def _unused(self) -> set[str]:
        """Dequantised values that no node reads any more."""
        used = {name for node in self.nodes for name in node_reads(node)} | {v.name for v in self.graph.output}
        decoders = ("Cast", "DequantizeLinear")
        return {node.output[0] for node in self.nodes if node.op_type in decoders and node.output[0] not in used}

    def _weight(self, tensor: TensorProto, name: str) -> TensorProto:
        value = array_of(tensor)
        largest = float(np.abs(value).max(initial=0.0))
        if not largest <= _LARGEST[self.precision]:  # also true for NaN
            raise PrecisionError(
                "E0661",
                "build",
                f"{self.precision} cannot hold the weights in {tensor.name}: expected at most "
                f"{_LARGEST[self.precision]:g}, got {largest:g}",
                f"give --precision {BF16 if self.precision == FP16 and np.isfinite(largest) else FP32}",
            )
        lowered = float_tensor(name, _FORMATS[self.precision], value)
        return self.spill.move(lowered) if self.spill else lowered


def _cast(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast:{target}", to=element)


def _values(graph: GraphProto) -> list[Any]:
    return [*graph.input, *graph.value_info, *graph.output]
