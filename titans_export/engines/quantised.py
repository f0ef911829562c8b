"""Quantised bundles: supported devices and precisions, and graph rewrites for compilers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import MachineError, UsageError
from ..manifest import Quantization
from ..onnx.initializers import drop_unread, initializers_of
from ..onnx.mapped import Spill, array_of, value_of
from ..onnx.nodes import all_nodes, attribute, copy_model, is_memory, makers_of, readers_of, replace_nodes
from ..safetensors_file import Raw
from .graphs import has_kernel
from .targets import BF16, FP8_FROM, FP16, FP32, ORT, RTX, TARGETS, TENSORRT, Target

STORED = {"float16": FP16, "bfloat16": BF16}  # weight formats that are also engine precisions
BLOCKS = (128, 64, 32, 16)  # block sizes for per-channel weights with float activations, as kernels need blocks
_INTEGERS = (TensorProto.INT8, TensorProto.INT4)
_MICROSOFT = "com.microsoft"


def weights_format(quantization: Quantization | None) -> str:
    """The format of the weights that the recipe quantises; "float32" without a recipe."""
    recipe = quantization.recipe if quantization else {}
    return str(recipe.get("weights", {}).get("format", "float32"))


def choose_precision(quantization: Quantization | None, target: Target, wanted: str | None) -> str:
    """The requested precision, else that of the stored weights, else fp32. Raises UsageError."""
    stored = STORED.get(weights_format(quantization))
    if wanted is None:
        return stored if stored in target.precisions else FP32
    if stored is not None and wanted not in (stored, FP32):
        problem = f"unsupported --precision for weights in {stored}: expected {stored} or {FP32}, got {wanted}"
        raise UsageError("E0104", "build", problem, f"give --precision {stored}, or quantize the float32 bundle again")
    return wanted


def check_target(
    quantization: Quantization | None, models: Iterable[ModelProto], target: Target, compiler: str
) -> None:
    """Raises MachineError if the target or the compiler cannot run the bundle."""
    formats = set(quantization.matmuls.values()) if quantization else set()
    if target.sm is not None and "fp8" in formats and target.sm < FP8_FROM:
        able = ", ".join(name for name, other in TARGETS.items() if other.sm is not None and other.sm >= FP8_FROM)
        raise MachineError(
            "E0655",
            "build",
            f"unsupported target for matmuls in fp8: expected sm_{FP8_FROM} or newer ({able}), "
            f"got {target.name} (sm_{target.sm})",
            "quantize with --recipe int8 or int4-weight-only for it",
        )
    bare = [node for model in models for node in model.graph.node if is_memory(node) and not node.overload]
    if target.sm is None or not bare:
        return
    memory_dtype = attribute(bare[0], "memory_dtype") or "float32"
    if compiler == RTX:
        other = TENSORRT if TENSORRT in target.compilers else ORT
        raise MachineError(
            "E0655",
            "build",
            f"unsupported memory dtype {memory_dtype}: {RTX} runs standard operators only",
            f"give --compiler {other}, or quantize with --memory float32",
        )
    if not all(has_kernel(node) for node in bare):
        raise MachineError(
            "E0655",
            "build",
            f"unsupported memory: there is no GPU kernel for gates per chunk in {memory_dtype}",
            "quantize with --memory float32, or build for the CPU",
        )


def for_compiler(model: ModelProto, spill: Spill | None = None) -> ModelProto:
    """A copy that TensorRT and TensorRT-RTX accept.

    They need a quantised table dequantised before the Gather. TensorRT-RTX 1.7 cannot build blockwise int8, so such
    weights become float32 with the same values. spill: where large new weights go; None keeps them inside.
    """
    result = copy_model(model)
    graph = result.graph
    weights = initializers_of(graph)
    readers = readers_of(graph)
    dropped: set[str] = set()
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in weights:
            _dequantise_first(node, readers.get(node.output[0], []), weights)
        elif _unfit(node, weights):
            weight = _float32(node, weights)
            graph.initializer.append(spill.move(weight) if spill else weight)
            dropped.add(node.output[0])
    replace_nodes(graph, [n for n in graph.node if not (n.op_type == "DequantizeLinear" and n.output[0] in dropped)])
    drop_unread(graph)
    return result


def weights_alone(model: ModelProto) -> ModelProto:
    """A copy whose int8 matmuls take unrounded inputs, with weights in the blocks that CPU kernels accept.

    Such a kernel rounds its input in blocks at run time, which is closer and faster than one scale for the whole input.
    One token costs one read of the weights, so fewer surrounding nodes help most.
    """
    result = copy_model(model)
    graph = result.graph
    weights = initializers_of(graph)
    makers = makers_of(graph)
    changed: dict[str, str] = {}  # dequantised weight to its blockwise form
    added: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        rounded, weight = (_dequantising(makers.get(name)) for name in node.input)
        source = makers.get(rounded.input[0]) if rounded is not None else None
        if source is None or source.op_type != "QuantizeLinear" or weight is None or weight.input[0] not in weights:
            continue
        name = weight.output[0]
        if name not in changed and (made := _in_blocks(weight, weights, graph)) is not None:
            changed[name] = made.output[0]
            added.append(made)
        if name in changed:
            node.input[0], node.input[1] = source.input[0], changed[name]
    replace_nodes(graph, (*added, *graph.node))
    _drop_unread_rounding(graph)
    drop_unread(graph)
    return result


def fuse_dequantised(model: ModelProto) -> None:
    """Turns the matmuls that still dequantise a weight of int8 or int4 in blocks into MatMulNBits.

    ONNX Runtime does so itself, but not for a weight that a graph multiplies several times, as a prefill of several
    chunks does: it would dequantise the weight in each call, before each matmul. All matmuls share one copy of it.
    """
    graph = model.graph
    weights = initializers_of(graph)
    makers = makers_of(graph)
    made: dict[tuple[str, str], list[TensorProto]] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        dequantise = _dequantising(makers.get(node.input[1])) if node.op_type == "MatMul" else None
        if dequantise is None or not _in_kernel_form(dequantise, weights):
            nodes.append(node)
            continue
        names = (dequantise.input[0], dequantise.input[1])
        values, block = weights[names[0]], attribute(dequantise, "block_size")
        if names not in made:
            made[names] = _kernel_form(values, weights[names[1]], block)
        inputs = [node.input[0], *(tensor.name for tensor in made[names])]
        rows, columns = values.dims
        bits = 4 if values.data_type == TensorProto.INT4 else 8
        sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain=_MICROSOFT, **sizes)
        )
    replace_nodes(graph, nodes)
    graph.initializer.extend(tensor for tensors in made.values() for tensor in tensors)
    _drop_unread_rounding(graph)
    drop_unread(graph)


def _in_kernel_form(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Whether MatMulNBits can take a dequantised weight: (K, N) in blocks of rows, without zero points."""
    values, scales = weights.get(node.input[0]), weights.get(node.input[1])
    if values is None or scales is None or len(node.input) > 2 or values.data_type not in _INTEGERS:
        return False
    block = attribute(node, "block_size", 0)
    if len(values.dims) != 2 or attribute(node, "axis", 1) != 0 or block < 16 or block & (block - 1):
        return False
    return values.dims[0] % block == 0 and scales.data_type == TensorProto.FLOAT


def _kernel_form(values: TensorProto, scales: TensorProto, block: int) -> list[TensorProto]:
    """The weight and its scales as MatMulNBits takes them: by output channel, unsigned, in blocks of bytes."""
    rows, columns = values.dims
    if values.data_type == TensorProto.INT4:
        raw = value_of(values)
        assert isinstance(raw, Raw)
        packed = np.frombuffer(raw.data, np.uint8)
        flat = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: rows * columns]
        numbers = (flat.reshape(rows, columns).T ^ 8).reshape(columns, rows // block, block)
        stored = numbers[..., 0::2] | numbers[..., 1::2] << 4
    else:
        numbers = array_of(values).view(np.uint8).T ^ np.uint8(128)
        stored = numbers.reshape(columns, rows // block, block)
    turned = np.ascontiguousarray(array_of(scales).T).reshape(-1)
    stored = np.ascontiguousarray(stored)
    return [
        numpy_helper.from_array(stored, f"{values.name}_T"),
        numpy_helper.from_array(turned, f"{scales.name}_T"),
    ]


def _dequantising(node: NodeProto | None) -> NodeProto | None:
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _in_blocks(node: NodeProto, weights: Mapping[str, TensorProto], graph: GraphProto) -> NodeProto | None:
    """A DequantizeLinear of the same int8 (K, N) with scales (K / block, N), repeated from the channels' scales. None
    if the weight does not qualify.
    """
    values, scale = weights[node.input[0]], weights.get(node.input[1])
    if scale is None or values.data_type != TensorProto.INT8 or attribute(node, "axis") != 1 or len(scale.dims) != 1:
        return None
    rows = values.dims[0]
    block = next((block for block in BLOCKS if rows % block == 0), None)
    if block is None:
        return None
    blocks = np.repeat(array_of(scale)[None], rows // block, axis=0)
    name = f"{node.output[0]}.blocks"
    graph.initializer.append(numpy_helper.from_array(blocks, f"{name}.scale"))
    inputs = [values.name, f"{name}.scale"]
    return helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=0, block_size=block)


def _drop_unread_rounding(graph: GraphProto) -> None:
    """Removes QuantizeLinear and DequantizeLinear nodes without readers."""
    while True:
        read = {value.name for value in graph.output} | {name for node in all_nodes(graph) for name in node.input}
        kept = [
            node
            for node in graph.node
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.output[0] in read
        ]
        if len(kept) == len(graph.node):
            return
        replace_nodes(graph, kept)


def _unfit(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    if node.op_type != "DequantizeLinear" or node.input[0] not in weights or not attribute(node, "block_size"):
        return False
    return weights[node.input[0]].data_type == TensorProto.INT8


def _float32(node: NodeProto, weights: Mapping[str, TensorProto]) -> TensorProto:
    """The weight that the node dequantises, in float32."""
    values = array_of(weights[node.input[0]]).astype(np.float32)
    scales = array_of(weights[node.input[1]])
    axis = attribute(node, "axis")
    wide = np.repeat(scales, attribute(node, "block_size"), axis=axis)
    return numpy_helper.from_array(values * wide, node.output[0])


def _dequantise_first(gather: NodeProto, readers: list[NodeProto], weights: Mapping[str, TensorProto]) -> None:
    """Swaps a Gather from a table and the DequantizeLinear after it. The two nodes exchange their roles."""
    table = weights[gather.input[0]]
    if table.data_type not in _INTEGERS or len(readers) != 1 or readers[0].op_type != "DequantizeLinear":
        return
    dequantise = readers[0]
    indices, output = gather.input[1], dequantise.output[0]
    scale = dequantise.input[1]
    # The earlier node must dequantise, to keep the topological order.
    first = helper.make_node(
        "DequantizeLinear", [table.name, scale], [f"{output}.table"], name=dequantise.name, axis=len(table.dims) - 1
    )
    second = helper.make_node("Gather", [first.output[0], indices], [output], name=gather.name, axis=0)
    gather.CopyFrom(first)
    dequantise.CopyFrom(second)
