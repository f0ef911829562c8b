"""ONNX Runtime: for the CPU a graph optimised ahead of time, for CUDA the graph in its precision.

Weights stay in the bundle's weights.safetensors; an engine's file holds new ones only. The memory's function bodies
stay too, so sessions run with or without our registered kernel.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import uses_external_data

from ..errors import MachineError
from ..onnx.files import load_graph, load_structure, write_graph
from ..onnx.initializers import initializers_of
from ..onnx.nodes import copy_model
from ..operators import DOMAIN
from .quantised import weights_alone

# Weight formats without CPU matmuls. A session converts them to float32 when it opens; an engine's file does not.
EXPANDED = ("float16", "bfloat16", "fp8")
_DOMAINS = ("", "ai.titans", "com.microsoft")


def optimise(source: Path, work: Path, format: str = "float32") -> ModelProto:
    """The graph after ONNX Runtime's rewrites that are independent of the instruction set, so that any CPU can run it.

    format: the format of the bundle's weights.
    """
    graph = source
    if format == "int8":
        graph = write_graph(weights_alone(load_graph(source)), work / "alone.onnx")
    options = onnxruntime.SessionOptions()
    # The next level also chooses layouts for the machine it runs on.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    optimised = work / "optimised.onnx"
    options.optimized_model_filepath = str(optimised)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    # Registering the kernel's operator keeps memory nodes; otherwise their functions would be inlined.
    options.register_custom_ops_library(str(kernel_library()))
    disabled = []
    if format in EXPANDED:
        disabled = ["ConstantFolding"]
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    model = onnx.load(str(optimised))
    original = load_structure(source)
    model.functions.extend(original.functions)
    kept = [entry for entry in model.opset_import if entry.domain in _DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    kept_nodes = {(node.op_type, node.overload) for node in model.graph.node if node.domain == DOMAIN}
    had_nodes = {(node.op_type, node.overload) for node in original.graph.node if node.domain == DOMAIN}
    if had_nodes != kept_nodes:
        problem = f"ONNX Runtime {onnxruntime.__version__} removes the memory's nodes"
        raise MachineError("E0653", "build", problem, "pip install -U onnxruntime")
    return point_back(model, source)


def kernel_library() -> Path:
    """The custom operator library beside the runtime. Raises MachineError if it is missing."""
    from titans_runtime._library import _library_path

    path = Path(_library_path()).with_name("libtitans_onnxruntime_ops.so")
    if not path.is_file():
        fix = "install titans-runtime again, with Highway's headers in .deps"
        raise MachineError("E1006", "build", f"no memory kernel for ONNX Runtime: {path} is missing", fix)
    return path


def point_back(model: ModelProto, source: Path) -> ModelProto:
    """Turns weights that the bundle already holds into references to its file."""
    references = initializers_of(load_structure(source).graph)
    values = initializers_of(load_graph(source).graph)
    result = copy_model(model)
    for tensor in result.graph.initializer:
        reference = references.get(tensor.name)
        if reference is not None and uses_external_data(reference) and _equal(tensor, values[tensor.name]):
            tensor.CopyFrom(reference)
        else:
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
    return result


def _equal(a: TensorProto, b: TensorProto) -> bool:
    return a.data_type == b.data_type and list(a.dims) == list(b.dims) and bool(a.raw_data == b.raw_data)
