"""Running a bundle with the inputs of its matmuls shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnxruntime

from titans_calibration.matmuls import is_matmul
from titans_export.bundle import Bundle
from titans_export.manifest import GraphEntry
from titans_export.onnx.mapped import array_of, for_session, is_mapped, mapped
from titans_export.onnx.nodes import attribute, copy_model, is_memory, is_memory_function, replace_functions
from titans_export.running import BundleRunner, memory_kernel, open_session

PACKED_BYTES = 1 << 30  # most bytes of weights over all sessions that are packed, a copy for each session


def matmul_inputs(model: onnx.ModelProto) -> dict[str, tuple[int, list[str]]]:
    """By weight that is the second input of a MatMul or Gemm: its input channels, and the values that it multiplies."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    found: dict[str, tuple[int, list[str]]] = {}
    for node in model.graph.node:
        if not is_matmul(node) or len(shapes.get(node.input[1], ())) != 2:
            continue
        if node.input[0] in shapes or attribute(node, "transA", 0):
            continue
        channels = shapes[node.input[1]][attribute(node, "transB", 0)]
        values = found.setdefault(node.input[1], (channels, []))[1]
        if node.input[0] not in values:
            values.append(node.input[0])
    return found


def without_memory_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose memory nodes need the kernel."""
    result = copy_model(model)
    replace_functions(result, [f for f in result.functions if not is_memory_function(f)])
    for node in result.graph.node:
        if is_memory(node):
            node.overload = ""
    return result


def open_runner(
    bundle: Bundle,
    models: Mapping[str, onnx.ModelProto],
    shown: Mapping[str, Sequence[str]] | None = None,
    kernel: bool = True,
) -> BundleRunner:
    """A runner of forms of the bundle's graphs whose calls also return the values `shown` of each graph.

    Sessions of large graphs share the mapped weights, which then stay unpacked: slower, but only once in memory.
    Weights are in the models or in the bundle's file. Memories run in the memory kernel if it is installed and
    `kernel` is true, else as their function bodies.
    """
    library = memory_kernel() if kernel else None
    packed = len(models) * (bundle.path / bundle.manifest.weights.file).stat().st_size <= PACKED_BYTES
    weights: dict[str, onnxruntime.OrtValue] = {}

    def open_graph(graph: GraphEntry) -> onnxruntime.InferenceSession:
        source = models[graph.name]
        model = for_session(without_memory_functions(source) if library else source, bundle.path)
        named = {value.name for value in (*model.graph.output, *model.graph.input)}
        values = dict.fromkeys((shown or {}).get(graph.name, ()))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in named)
        config = {"session.intra_op.allow_spinning": "0"}  # NumPy needs the cores between calls
        options = onnxruntime.SessionOptions()
        if not packed:
            config["session.disable_prepacking"] = "1"
            for tensor in mapped(model, bundle.path).graph.initializer:
                if is_mapped(tensor):
                    if tensor.name not in weights:
                        weights[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array_of(tensor))
                    options.add_initializer(tensor.name, weights[tensor.name])
        return open_session(model, kernel=library, folder=bundle.path, config=config, options=options)

    return BundleRunner(bundle, open_graph, shown)
