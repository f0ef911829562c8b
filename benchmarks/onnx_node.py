"""Models of one `ai.titans::NeuralMemory` node, and how ONNX Runtime is called with them without copies."""

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
from titans_export.model.node import DOMAIN, INPUTS, OPERATOR, OUTPUTS, VERSION, attributes
from titans_export.onnx.functions import INTEGER_INPUTS, build_function
from titans_export.onnx.tracing import IR_VERSION, OPSET

ALIGNMENT = 64  # bytes
KEPT = {"update": ("y", "state_out"), "read": ("y",)}  # the graph's outputs; nobody needs stats here


@dataclass(frozen=True)
class Node:
    """A node: memory, mode, whether its chunks are aligned, and the shapes of its inputs by name."""

    spec: MemorySpec
    mode: str
    aligned: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def model(self, with_body: bool) -> onnx.ModelProto:
        """The node alone in a model, with the function body of its configuration or for a registered kernel."""
        shapes = dict(self.shapes)
        present = [name for name in INPUTS if name in shapes]
        last = max(INPUTS.index(name) for name in present)
        node = helper.make_node(
            OPERATOR,
            [name if name in shapes else "" for name in INPUTS[: last + 1]],
            list(OUTPUTS[self.mode]),
            domain=DOMAIN,
            **attributes(self.spec, self.mode, self.aligned),
        )
        functions = []
        if with_body:
            functions = [build_function(self.spec, self.mode, self.aligned, self.shapes)]
            node.overload = functions[0].overload
        inputs = [helper.make_tensor_value_info(name, _dtype(name), shapes[name]) for name in present]
        result = {"y": shapes["q"], "state_out": shapes["state"]}
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, result[name]) for name in KEPT[self.mode]]
        return helper.make_model(
            helper.make_graph([node], "memory", inputs, outputs),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
            functions=functions,
            ir_version=IR_VERSION,
        )


def _dtype(name: str) -> int:
    return TensorProto.INT64 if name in INTEGER_INPUTS else TensorProto.FLOAT


def find_kernel_library() -> Path | None:
    """The library that registers the kernel with ONNX Runtime, beside the installed runtime. None: it is not there."""
    import titans_runtime

    path = Path(titans_runtime.__file__).with_name("libtitans_onnxruntime_ops.so")
    return path if path.is_file() else None


def open_model(model: onnx.ModelProto, threads: int, library: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU with so many threads, the kernel's library registered where one is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def aligned_copy(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts on a cache line, as what a runtime allocates does, and NumPy's own arrays do not."""
    memory = np.empty(values.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy: NDArray[Any] = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def value(values: NDArray[Any]) -> onnxruntime.OrtValue:
    """A copy of the values for ONNX Runtime, which takes the memory of an array as it is."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(aligned_copy(values))


class Call:
    """A call with all of its inputs and outputs bound beforehand; `y` is where its retrievals will be."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, NDArray[Any]],
        state: onnxruntime.OrtValue,
        state_out: onnxruntime.OrtValue | None,
    ) -> None:
        self._session = session
        self.y = value(np.zeros_like(inputs["q"]))
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("state", state)
        for name, values in inputs.items():
            self._binding.bind_ortvalue_input(name, value(values))
        self._binding.bind_ortvalue_output("y", self.y)
        if state_out is not None:
            self._binding.bind_ortvalue_output("state_out", state_out)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
