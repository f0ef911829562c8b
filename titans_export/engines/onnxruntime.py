"""ONNX Runtime: for the CPU a graph optimised ahead of time, for CUDA the graph in its precision.

Weights stay in the bundle's weights.safetensors; an engine's file holds new ones only. The memory's function bodies
stay too, so sessions run with or without our registered kernel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import uses_external_data

from ..errors import MachineError
from ..files import utf8_path
from ..onnx.files import load_structure
from ..onnx.initializers import initializers_of
from ..onnx.mapped import for_session, load_mapped, same_reference, value_of
from ..onnx.nodes import copy_model
from ..operators import DOMAIN
from ..running import open_session
from ..safetensors_file import blocks_of
from .quantised import fuse_dequantised, weights_alone

# Weight formats without CPU matmuls. A session converts them to float32 when it opens; an engine's file does not.
EXPANDED = ("float16", "bfloat16", "fp8")
_DOMAINS = ("", "ai.titans", "com.microsoft")


def optimise(source: Path, work: Path, format: str = "float32") -> ModelProto:
    """The graph after ONNX Runtime's rewrites that are independent of the instruction set, so that any CPU can run it.

    format: the format of the bundle's weights. New weights are mapped from files in `work`.
    """
    graph: Path | ModelProto = source
    if format == "int8":
        graph = for_session(weights_alone(load_mapped(source)), source.parent)
    options = onnxruntime.SessionOptions()
    # The next level also chooses layouts for the machine it runs on.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    optimised = work / f"{source.stem}.optimised.onnx"
    config = {
        "session.optimized_model_external_initializers_file_name": optimised.with_suffix(".data").name,
        "session.disable_prepacking": "1",  # the session never runs
    }
    disabled = []
    if format in EXPANDED:
        disabled = ["ConstantFolding"]
        config["session.disable_quant_qdq"] = "1"
    # The kernel keeps memory nodes; without it their functions would be inlined.
    with utf8_path(work) as folder:
        options.optimized_model_filepath = f"{folder}/{optimised.name}"
        open_session(
            graph, kernel=kernel_library(), folder=source.parent, config=config, options=options, disabled=disabled
        )
    model = load_mapped(optimised)
    fuse_dequantised(model)
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
    values = initializers_of(load_mapped(source).graph)
    result = copy_model(model)
    for tensor in result.graph.initializer:
        reference = references.get(tensor.name)
        if reference is not None and uses_external_data(reference) and _equal(tensor, values[tensor.name]):
            tensor.CopyFrom(reference)
    return result


def _equal(a: TensorProto, b: TensorProto) -> bool:
    if a.data_type != b.data_type or list(a.dims) != list(b.dims):
        return False
    blocks = zip(blocks_of(value_of(a)), blocks_of(value_of(b)), strict=True)
    return same_reference(a, b) or all(np.array_equal(x, y) for x, y in blocks)
