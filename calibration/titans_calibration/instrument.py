"""Graphs that also give what matmuls take: which matmuls there are, and sessions that show their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from titans_calibration.matmuls import is_matmul
from titans_export.bundle import Bundle
from titans_export.errors import MachineError
from titans_export.manifest import GraphEntry
from titans_export.onnx.files import load_graph, load_structure
from titans_export.onnx.nodes import attribute, copy_model, is_memory, is_memory_function, replace_functions
from titans_export.schedule import next_graph

Arrays = dict[str, NDArray[Any]]
_CPU = ["CPUExecutionProvider"]
_EXTERNAL = "session.model_external_initializers_file_folder_path"


def matmul_inputs(model: onnx.ModelProto) -> dict[str, tuple[int, list[str]]]:
    """Of each weight that a MatMul or Gemm of the graph takes second: input channels, and the values that meet it."""
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
    """The same graph with memory nodes that ask for a kernel."""
    result = copy_model(model)
    replace_functions(result, [f for f in result.functions if not is_memory_function(f)])
    for node in result.graph.node:
        if is_memory(node):
            node.overload = ""
    return result


def open_graph(
    model: onnx.ModelProto, folder: Path, shown: Iterable[str] = (), kernel: bool = True
) -> onnxruntime.InferenceSession:
    """A session on a CPU of a graph whose weights lie in `folder` or inside, with further values among its outputs.

    Memories run in our kernel where its library is and `kernel` asks for it, else as their function bodies.
    """
    from titans_export.engines.onnxruntime import kernel_library

    named = {value.name for value in (*model.graph.output, *model.graph.input)}
    library: Path | None = None
    if kernel:
        with suppress(MachineError, ImportError):
            library = kernel_library()
    result = without_memory_functions(model) if library else copy_model(model)
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(shown) if name not in named)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(_EXTERNAL, str(folder.resolve()))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # NumPy wants the cores between calls
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(result.SerializeToString(), options, providers=_CPU)


class Runner:
    """A bundle's stream in ONNX Runtime, call by call, from any state. Graphs open when they first run."""

    def __init__(
        self,
        bundle: Bundle,
        models: Mapping[str, onnx.ModelProto],
        shown: Mapping[str, list[str]] | None = None,
        kernel: bool = True,
    ) -> None:
        manifest = bundle.manifest
        self.graphs, self.output = manifest.graphs, manifest.output.name
        self._input, self._controls = manifest.input.name, manifest.controls
        self._states = manifest.state
        self._folder, self._models, self._shown, self._kernel = bundle.path, models, shown or {}, kernel
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, list[str]]] = {}

    def next(self, position: int, remaining: int) -> GraphEntry:
        """The graph that runs next."""
        return next_graph(self.graphs, position, remaining)

    def run(self, graph: GraphEntry, given: NDArray[Any], position: int, state: Arrays) -> tuple[Arrays, Arrays]:
        """All values of one call by name, inputs of the graph included, and the state after it."""
        session, names = self._open(graph.name)
        feeds = {
            self._input: given[None],
            self._controls.position: np.array([position], np.int64),
            self._controls.learn: np.array([True]),
            **{entry.input: state[entry.name] for entry in self._states},
        }
        values = dict(zip(names, session.run(names, feeds), strict=True))
        return {**feeds, **values}, {entry.name: values[entry.output] for entry in self._states}

    def _open(self, name: str) -> tuple[onnxruntime.InferenceSession, list[str]]:
        if name not in self._sessions:
            model, shown = self._models[name], self._shown.get(name, [])
            session = open_graph(model, self._folder, shown, self._kernel)
            wanted = dict.fromkeys([self.output, *(entry.output for entry in self._states), *shown])
            given = {value.name for value in model.graph.input}  # at hand, and no outputs
            self._sessions[name] = (session, [value for value in wanted if value not in given])
        return self._sessions[name]


def load_models(bundle: Bundle, weights: bool) -> dict[str, onnx.ModelProto]:
    """The bundle's graphs by name; without `weights` those point into the bundle's file."""
    load = load_graph if weights else load_structure
    return {name: load(path) for name, path in bundle.graph_paths().items()}
