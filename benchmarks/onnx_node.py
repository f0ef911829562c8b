"""Models of one `ai.titans::NeuralMemory` node, and ONNX Runtime calls without copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes
from titans_export.onnx.functions import build_function
from titans_export.onnx.tracing import IR_VERSION, OPSET
from titans_export.operators import DOMAIN, NEURAL_MEMORY, VERSION
from titans_export.operators.neural_memory import MODES

ALIGNMENT = 64  # bytes
KEPT = ("y", "state_out")  # the graph's outputs; stats are not needed


@dataclass(frozen=True)
class Layer:
    """The nodes of a memory layer. aligned: whether its chunks are aligned. shapes: of the update's inputs, by name.

    With `context` among the inputs, the layer reads before it updates, as in MAC; a gate depends on the read.
    """

    spec: MemorySpec
    aligned: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def model(self, with_body: bool) -> onnx.ModelProto:
        """A model with only this layer. with_body: with the nodes' function bodies, instead of for a registered
        kernel.
        """
        shapes = dict(self.shapes)
        context = shapes.pop("context", None)
        functions: list[onnx.FunctionProto] = []
        nodes: list[onnx.NodeProto] = []
        inputs, results = dict(shapes), {"y": shapes["q"], "state_out": shapes["state"]}
        renamed: dict[str, str] = {}
        if context is not None:
            inputs["context"] = results["read"] = context
            reading = {"state": shapes["state"], "q": context}
            nodes.append(self._node("read", reading, {"q": "context"}, ["read"], functions if with_body else None))
            nodes.append(helper.make_node("ReduceMax", ["read", "last"], ["most"], keepdims=0))
            nodes.append(helper.make_node("Mul", ["most", "nought"], ["nothing"]))
            nodes.append(helper.make_node("Add", ["step_size", "nothing"], ["step_size_after"]))
            renamed["step_size"] = "step_size_after"
        outputs = list(MODES["update"])
        nodes.append(self._node("update", shapes, renamed, outputs, functions if with_body else None))
        kept = [*KEPT, *(("read",) if context is not None else ())]
        return helper.make_model(
            helper.make_graph(
                nodes,
                "memory",
                [helper.make_tensor_value_info(name, _dtype(name), shape) for name, shape in inputs.items()],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, results[name]) for name in kept],
                [
                    helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
                    helper.make_tensor("nought", TensorProto.FLOAT, [], [0.0]),
                ],
            ),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
            functions=functions,
            ir_version=IR_VERSION,
        )

    def _node(
        self,
        mode: str,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Mapping[str, str],
        outputs: list[str],
        functions: list[onnx.FunctionProto] | None,
    ) -> onnx.NodeProto:
        """A node of the operator. Adds its function body to `functions`, unless that is None."""
        names = [renamed.get(name, name) for name in NEURAL_MEMORY.operands(shapes)]
        node: onnx.NodeProto = helper.make_node(
            NEURAL_MEMORY.name, names, outputs, domain=DOMAIN, **attributes(self.spec, mode, self.aligned)
        )
        if functions is not None:
            node_shapes = {renamed.get(name, name): shape for name, shape in shapes.items()}
            functions.append(build_function(node_shapes, node))
            node.overload = functions[-1].overload
        return node


def _dtype(name: str) -> int:
    # `context` is the only name that is no input of the operator.
    integer = name in NEURAL_MEMORY.input_names and NEURAL_MEMORY.dtype(name) == "int64"
    return TensorProto.INT64 if integer else TensorProto.FLOAT


def find_kernel_library() -> Path | None:
    """The library beside the installed runtime that registers the kernel with ONNX Runtime; None if it is missing."""
    import titans_runtime

    path = Path(titans_runtime.__file__).with_name("libtitans_onnxruntime_ops.so")
    return path if path.is_file() else None


def open_model(model: onnx.ModelProto, threads: int, library: Path | None = None) -> onnxruntime.InferenceSession:
    """A CPU session with this many threads, and with the kernel's library registered if one is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def aligned_copy(values: NDArray[Any]) -> NDArray[Any]:
    """A copy aligned to a cache line, as runtimes allocate it; NumPy's own arrays are not aligned."""
    memory = np.empty(values.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy: NDArray[Any] = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def value(values: NDArray[Any]) -> onnxruntime.OrtValue:
    """A copy of the values as an OrtValue. ONNX Runtime uses an array's memory directly."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(aligned_copy(values))


class Call:
    """A call with all inputs and outputs bound beforehand. results: the buffers of y and of the read."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, NDArray[Any]],
        state: onnxruntime.OrtValue,
        state_out: onnxruntime.OrtValue,
    ) -> None:
        self._session = session
        self.results = {"y": value(np.zeros_like(inputs["q"]))}
        if "context" in inputs:
            self.results["read"] = value(np.zeros_like(inputs["context"]))
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("state", state)
        for name, values in inputs.items():
            self._binding.bind_ortvalue_input(name, value(values))
        for name, result in self.results.items():
            self._binding.bind_ortvalue_output(name, result)
        self._binding.bind_ortvalue_output("state_out", state_out)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
