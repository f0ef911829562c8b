"""One node of the operator as an ONNX model, in ONNX Runtime with our library of custom operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from cases import Case
from kernel_runner import operator_of
from onnx import TensorProto, helper

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import initial_rows
from titans_export.operators import DOMAIN, VERSION
from titans_export.operators.neural_memory import MODES
from titans_runtime._library import _library_path

Arrays = dict[str, npt.NDArray[Any]]
LIBRARY = Path(_library_path()).with_name("libtitans_onnxruntime_ops.so")
CPU = "CPUExecutionProvider"
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def make_model(
    feeds: Arrays,
    node: dict[str, Any],
    repeat: int = 1,
    values: int = TensorProto.FLOAT,
    initial_weights: tuple[int, ...] | None = None,
) -> bytes:
    """A model of `repeat` nodes, the state going from each to the next, over inputs of the feeds' shapes.

    node: the attributes. values: the type of q, k, v and y. initial_weights: the shape of that output, or None.
    """
    operator = operator_of(node)
    names = operator.operands(feeds)
    outputs = (*MODES[node.get("mode", "update")], *(("initial_weights",) if initial_weights else ()))
    nodes = []
    for i in range(repeat):
        first, last = i == 0, i == repeat - 1
        inputs = [name if first or name != "state" else f"state_{i}" for name in names]
        results = [name if last else f"{name}_{i}" if name != "state_out" else f"state_{i + 1}" for name in outputs]
        nodes.append(helper.make_node(operator.name, inputs, results, domain=DOMAIN, **node))
    types = {entry.name: TYPES[entry.dtype] for entry in operator.inputs}
    types |= dict.fromkeys(("q", "k", "v", "y"), values)
    shapes = {
        "y": feeds["q"].shape,
        "state_out": feeds["state"].shape,
        "stats": (*feeds["q"].shape[:2], 4),
        "initial_weights": initial_weights,
    }
    graph = helper.make_graph(
        nodes,
        "one",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), feeds[name].shape)
            for name in names
            if name
        ],
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shapes[name]) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def make_session(
    model: bytes, threads: int = 1, provider: str = "CPUExecutionProvider"
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def make_feeds(case: Case, aligned: bool = False) -> Arrays:
    names = ("q", "k", "v", "step_size", "momentum", "forget_gate")
    feeds = {"state": initial_rows(case.spec, case.weights).float().numpy().copy()}
    feeds |= {n: x.float().numpy() for n, x in zip(names, (case.q, case.k, case.v, *case.gates), strict=True)}
    if not aligned:
        feeds["fill"] = np.zeros(case.streams, np.int64)
    if case.norm_scale is not None:
        feeds["norm_scale"] = case.norm_scale.float().numpy()
    return feeds


def make_case(spec: MemorySpec, length: int) -> Case:
    case = Case(spec, length)
    if spec.layer_norm:
        case.step_size *= 0.1
    return case
