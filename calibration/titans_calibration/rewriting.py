"""Adds QuantizeLinear, DequantizeLinear and Cast around the matmuls and lookups of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from titans_calibration.formats import CASTS, Table, cast_weight
from titans_calibration.matmuls import FLOAT32, Matmul, QuantiseError, is_lookup
from titans_calibration.weights import LARGEST, pack_int4
from titans_export.engines.quantised import BLOCKS
from titans_export.onnx.initializers import initializers_of, make_tensor, replace_initializers
from titans_export.onnx.mapped import Spill, array_of
from titans_export.onnx.nodes import (
    ONNX_DOMAINS,
    copy_model,
    makers_of,
    names_read,
    readers_of,
    replace_nodes,
    subgraphs,
)

OPSET = 21  # the first with int4 and with scales in blocks


def block_of(rows: int) -> int | None:
    """The block size in which a weight-only matmul repeats its channel scales; None if none divides `rows`."""
    return next((block for block in BLOCKS if rows % block == 0), None)


@dataclass
class Rewriting:
    """The rewriting of one graph. folded: by weight, whether its input's factors went into the norm before it.

    spill: where new initialisers go; None keeps them inside the graph.
    """

    name: str
    source: ModelProto
    matmuls: Mapping[str, Matmul]
    embeddings: Mapping[str, Table]
    spill: Spill | None = None
    model: ModelProto = field(init=False)
    folded: dict[str, bool] = field(default_factory=dict)

    def run(self) -> None:
        self.model = copy_model(self.source)
        graph = self.model.graph
        self.weights = initializers_of(graph)
        self.readers = readers_of(graph)
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info)
            if value.type.tensor_type.HasField("shape")
        }
        self.elsewhere = {value.name for value in graph.output}  # read by outputs and subgraphs
        self.elsewhere.update(name for node in graph.node for inner in subgraphs(node) for name in names_read(inner))
        self.makers = makers_of(graph)
        self.names = {node.name for node in graph.node}
        self.taken = set(self.weights) | set(self.makers) | {value.name for value in graph.input}
        self.added: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, ...], str] = {}  # values that exist already, by purpose
        uses = {use.index: matmul for matmul in self.matmuls.values() for use in matmul.uses
                if use.graph == self.name and matmul.format != FLOAT32}  # fmt: skip
        self._fold(graph, uses)
        biased: dict[str, NodeProto] = {}
        for index, node in enumerate(graph.node):
            if index in uses:
                self._matmul(node, uses[index])
                if uses[index].format in LARGEST and node.op_type == "MatMul":
                    biased[node.output[0]] = node
            elif node.op_type == "Add" and node.domain == "" and set(node.input) & set(biased):
                self._bias(node, biased)
            elif is_lookup(node) and node.input[0] in self.embeddings:
                self._lookup(node, self.embeddings[node.input[0]])
            else:
                self.nodes.append(node)
        self._replace(graph)
        _raise_opset(self.model)

    def _fold(self, graph: GraphProto, uses: Mapping[int, Matmul]) -> None:
        """Divides the scale of a norm by the factors, if these matmuls alone read its output."""
        scaled: dict[str, Matmul] = {}
        for index, matmul in uses.items():
            if matmul.factors is not None:
                scaled.setdefault(graph.node[index].input[0], matmul)
        self.in_norm: set[str] = set()
        for value, matmul in scaled.items():
            assert matmul.factors is not None
            maker = self.makers.get(value)
            readers = self.readers[value]
            ours = [uses.get(i) for i, node in enumerate(graph.node) if value in node.input and node.input[0] == value]
            alone = len(ours) == len(readers) and all(
                other is not None and other.leader == matmul.leader for other in ours
            )
            fold = False
            if maker is not None and maker.op_type == "Mul" and alone and value not in self.elsewhere:
                fold = self._fold_into(maker, matmul)
            if fold:
                self.in_norm.add(value)
            for other in uses.values():
                if other.leader == matmul.leader:
                    self.folded[other.name] = self.folded.get(other.name, True) and fold

    def _fold_into(self, node: NodeProto, matmul: Matmul) -> bool:
        assert matmul.factors is not None
        for place, name in enumerate(node.input):
            tensor = self.weights.get(name)
            if tensor is None or tensor.data_type != TensorProto.FLOAT or not tensor.dims:
                continue
            if tensor.dims[-1] != len(matmul.factors) or int(np.prod(tensor.dims)) != len(matmul.factors):
                continue
            value = array_of(tensor)
            key = (name, "norm", matmul.leader)
            if key not in self.made:
                scaled = (value.astype(np.float64) / matmul.factors).astype(np.float32)
                self.made[key] = self._add(numpy_helper.from_array(scaled, f"divided.{matmul.leader}.{name}"))
            node.input[place] = self.made[key]
            return True
        return False

    def _matmul(self, node: NodeProto, matmul: Matmul) -> None:
        if matmul.format in CASTS:
            node.input[1] = self._cast(matmul)
            self.nodes.append(node)
            return
        value = node.input[0]
        if matmul.factors is not None and value not in self.in_norm:
            value = self._divided(value, matmul)
        if matmul.input_scale is not None:
            value = self._rounded(value, matmul)
        node.input[0] = value
        node.input[1] = self._dequantised(matmul)
        self.nodes.append(node)

    def _bias(self, node: NodeProto, matmuls: Mapping[str, NodeProto]) -> None:
        """Gives the bias after a matmul three dimensions.

        With fewer, ONNX Runtime fuses both into a Gemm before it looks for quantised matmuls. It would then dequantise
        the whole weight in every call.
        """
        place = 0 if node.input[0] in matmuls else 1
        matmul, bias = node.input[place], self.weights.get(node.input[1 - place])
        rank = self.ranks.get(matmul)
        if bias is None or rank is None or rank < 2 or len(bias.dims) != 1:
            self.nodes.append(node)
            return
        key = (bias.name, "bias")
        if key not in self.made:
            value = array_of(bias)
            self.made[key] = self._add(numpy_helper.from_array(value.reshape(1, 1, -1), f"{bias.name}.row"))
        node.input[1 - place] = self.made[key]
        self.nodes.append(node)
        if rank == 2:
            if ("zeroth", "axis") not in self.made:
                axis = numpy_helper.from_array(np.zeros(1, np.int64), "axis.0")
                self.made["zeroth", "axis"] = self._add(axis)
            output, node.output[0] = node.output[0], _free(f"{node.output[0]}.row", self.taken)
            self._append("Squeeze", [node.output[0], self.made["zeroth", "axis"]], output)

    def _cast(self, matmul: Matmul) -> str:
        key = (matmul.name, "cast")
        if key not in self.made:
            name = f"{matmul.name}.{matmul.format}"
            matrix = matmul.matrix.T if matmul.transposed else matmul.matrix
            self._add(cast_weight(name, np.ascontiguousarray(matrix), matmul.format))
            self.made[key] = self._node("Cast", [name], f"{matmul.name}.cast", to=TensorProto.FLOAT)
        return self.made[key]

    def _divided(self, value: str, matmul: Matmul) -> str:
        assert matmul.factors is not None
        key = (value, "divided", matmul.leader)
        if key not in self.made:
            inverse = (1.0 / matmul.factors.astype(np.float64)).astype(np.float32)
            factor = self._add(numpy_helper.from_array(inverse, f"{matmul.leader}.input_factors"))
            self.made[key] = self._node("Mul", [value, factor], f"{value}.divided")
        return self.made[key]

    def _rounded(self, value: str, matmul: Matmul) -> str:
        """Rounds the input for each matmul, even if several share it.

        ONNX Runtime for x86 does not fuse matmuls that share a QuantizeLinear. It would dequantise the whole weight in
        every call.
        """
        assert matmul.input_scale is not None
        scale = numpy_helper.from_array(np.array(matmul.input_scale), f"{matmul.leader}.input_scale")
        inputs = [self._add(scale), self._zero(matmul.format)]
        rounded = self._node("QuantizeLinear", [value, *inputs], f"{value}.{matmul.format}")
        return self._node("DequantizeLinear", [rounded, *inputs], f"{value}.dequantised")

    def _zero(self, format: str) -> str:
        key = (format, "zero")
        if key not in self.made:
            tensor = make_tensor(f"zero.{format}", format, [], b"\0")
            self.made[key] = self._add(tensor)
        return self.made[key]

    def _dequantised(self, matmul: Matmul) -> str:
        key = (matmul.name, "weight")
        if key in self.made:
            return self.made[key]
        quantised = matmul.quantised
        assert quantised is not None
        values, scales, block = quantised.values, quantised.scales, matmul.group
        if block is None and matmul.input_scale is None and matmul.format != "fp8":
            block = block_of(len(values))
            scales = np.repeat(scales, len(values) // block, axis=0) if block else scales
        axis = 0 if block else 1
        if matmul.transposed:
            values, scales, axis = values.T, scales.T, 1 - axis
        shape = values.shape
        data = np.ascontiguousarray(values)
        raw = pack_int4(data.astype(np.int8)) if matmul.format == "int4" else data.tobytes()
        stem = f"{matmul.name}.{matmul.format}"
        weight = self._add(make_tensor(stem, matmul.format, shape, raw))
        scale = np.ascontiguousarray(scales if block else scales.reshape(-1))
        inputs = [weight, self._add(numpy_helper.from_array(scale, f"{stem}.scale"))]
        if matmul.input_scale is not None:
            inputs.append(self._weight_zeros(matmul, scale))
        attributes = {"axis": axis, "block_size": block} if block else {"axis": axis}
        self.made[key] = self._node("DequantizeLinear", inputs, f"{matmul.name}.dequantised", **attributes)
        return self.made[key]

    def _weight_zeros(self, matmul: Matmul, scale: NDArray[np.float32]) -> str:
        key = (matmul.format, "zeros", str(len(scale)))
        if key not in self.made:
            name = f"zeros.{matmul.format}.{len(scale)}"
            tensor = make_tensor(name, matmul.format, scale.shape, bytes(len(scale)))
            self.made[key] = self._add(tensor)
        return self.made[key]

    def _lookup(self, node: NodeProto, table: Table) -> None:
        source, output = node.input[0], node.output[0]
        if table.values.name not in self.added:
            self._add(table.values)
        node.input[0] = table.values.name
        node.output[0] = _free(f"{output}.{table.format}", self.taken)
        self.nodes.append(node)
        if table.scales is None:
            self._append("Cast", [node.output[0]], output, to=TensorProto.FLOAT)
            return
        key = (source, "scale")
        if key not in self.made:
            self.made[key] = self._add(numpy_helper.from_array(table.scales, f"{table.values.name}.scale"))
        self._append("DequantizeLinear", [node.output[0], self.made[key]], output, axis=-1)

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Appends a node and returns the name of its output."""
        name = _free(output, self.taken)
        self._append(operator, inputs, name, **attributes)
        return name

    def _append(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        name = _free(output, self.names)
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))

    def _add(self, tensor: TensorProto) -> str:
        tensor = self.spill.move(tensor) if self.spill else tensor
        known = self.added.get(tensor.name)
        if known is None and tensor.name in self.taken:
            problem = f"{self.name} already has a value {tensor.name}"
            raise QuantiseError("E0809", "quantize", problem, "give a float32 bundle")
        assert known is None or known == tensor
        self.taken.add(tensor.name)
        self.added[tensor.name] = tensor
        return str(tensor.name)

    def _replace(self, graph: GraphProto) -> None:
        """Replaces the nodes, and drops initialisers without readers."""
        replace_nodes(graph, self.nodes)
        used = names_read(graph)
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        replace_initializers(graph, [*kept, *self.added.values()])


def _free(name: str, taken: set[str]) -> str:
    """A free name, with a number if `name` is taken; adds it to `taken`."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    taken.add(found)
    return found


def _raise_opset(model: ModelProto) -> None:
    """Sets opset 21. The operators in use only gained types since opset 20."""
    for entries in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in entries:
            if entry.domain in ONNX_DOMAINS:
                entry.version = max(entry.version, OPSET)
