"""A stream's state carried through the graphs of a bundle in ONNX Runtime, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import MachineError
from .files import utf8_path
from .manifest import GraphEntry
from .schedule import calls, next_graph

Arrays = dict[str, NDArray[Any]]
_PROVIDERS = ["CPUExecutionProvider"]
_EXTERNAL = "session.model_external_initializers_file_folder_path"


class Call(NamedTuple):
    """A call that has run. position: of the stream before it.

    values: the graph's inputs, its output, the successors of the state and the values shown, by their names in the
    graph. state: the stream's state after the call, by the manifest's names.
    """

    graph: GraphEntry
    position: int
    values: Arrays
    state: Arrays


class BundleRunner:
    """Runs a bundle's graphs. The caller holds the state, so a stream can start from any state and be forked.

    A graph's session opens when it first runs: `open_graph` makes it, by default from the graph's file with the memory
    kernel if the kernel is installed. `shown` names further values of each graph that a call returns; the sessions of
    `open_graph` must have them as outputs.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Callable[[GraphEntry], onnxruntime.InferenceSession] | None = None,
        shown: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.graphs, self.output = bundle.manifest.graphs, bundle.manifest.output.name
        self._open_graph = open_graph or self._open_file
        self._shown = shown or {}
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, set[str], list[str]]] = {}
        self._dtype = np.int64 if self.manifest.input.kind == "tokens" else np.float32

    def next(self, position: int, remaining: int) -> GraphEntry:
        """The graph that the schedule runs at `position` with `remaining` tokens left."""
        return next_graph(self.graphs, position, remaining)

    def feeds(
        self, graph: GraphEntry, inputs: NDArray[Any], position: int, state: Arrays, learn: bool = True
    ) -> Arrays:
        """The graph's inputs: tokens (graph.tokens,) or vectors (graph.tokens, size), and the state before the call."""
        assert len(inputs) == graph.tokens
        controls = self.manifest.controls
        optional = {controls.valid: graph.tokens, controls.slots: 0}  # one stream, in the only slot
        return {
            self.manifest.input.name: np.asarray(inputs, self._dtype)[None],
            controls.position: np.array([position], np.int64),
            controls.learn: np.array([learn]),
            **{name: np.array([value], np.int64) for name, value in optional.items() if name is not None},
            **{entry.input: state[entry.name] for entry in self.manifest.state},
        }

    def run(self, graph: GraphEntry, inputs: NDArray[Any], position: int, state: Arrays, learn: bool = True) -> Call:
        """Runs one call from `state`, which stays as it is."""
        session, known, names = self._session(graph)
        feeds = self.feeds(graph, inputs, position, state, learn)
        given = {name: value for name, value in feeds.items() if name in known}
        values = {**feeds, **dict(zip(names, session.run(names, given), strict=True))}
        return Call(graph, position, values, {entry.name: values[entry.output] for entry in self.manifest.state})

    def stream(
        self, inputs: NDArray[Any], state: Arrays | None = None, position: int = 0, learn: bool = True
    ) -> Iterator[Call]:
        """Runs the schedule over all inputs, (T,) tokens or (T, size) vectors, from `state`, by default a fresh one."""
        state = self.bundle.initial_state() if state is None else state
        for at, graph in calls(self.graphs, position, len(inputs)):
            call = self.run(graph, inputs[at - position : at - position + graph.tokens], at, state, learn)
            state = call.state
            yield call

    def _open_file(self, graph: GraphEntry) -> onnxruntime.InferenceSession:
        return open_session(self.bundle.path / graph.file, kernel=memory_kernel())

    def _session(self, graph: GraphEntry) -> tuple[onnxruntime.InferenceSession, set[str], list[str]]:
        """The graph's session, the inputs that it takes and the outputs that a call reads."""
        if graph.name not in self._sessions:
            session = self._open_graph(graph)
            wanted = [self.output, *(entry.output for entry in self.manifest.state), *self._shown.get(graph.name, ())]
            given = {value.name for value in session.get_inputs()}  # their values are known without the session
            self._sessions[graph.name] = session, given, [name for name in dict.fromkeys(wanted) if name not in given]
        return self._sessions[graph.name]


def memory_kernel() -> Path | None:
    """The library with the memory kernel for ONNX Runtime, None if it is not installed."""
    from .engines.onnxruntime import kernel_library

    try:
        return kernel_library()
    except (MachineError, ImportError):
        return None


def open_session(
    model: Path | onnx.ModelProto,
    *,
    kernel: Path | None = None,
    folder: Path | None = None,
    config: Mapping[str, str] | None = None,
    options: onnxruntime.SessionOptions | None = None,
    disabled: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    kernel: a library of custom operators; without it memory nodes run as their function bodies. folder: where the
    weights of a model in memory lie. config: entries of ONNX Runtime's session configuration. disabled: optimisers.
    """
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if kernel is not None:
        options.register_custom_ops_library(str(kernel))
    with ExitStack() as names:
        if isinstance(model, Path):
            source = names.enter_context(utf8_path(model))
        else:
            source = model.SerializeToString()
            if folder is not None:
                options.add_session_config_entry(_EXTERNAL, names.enter_context(utf8_path(folder.resolve())))
        return onnxruntime.InferenceSession(source, options, providers=_PROVIDERS, disabled_optimizers=list(disabled))
