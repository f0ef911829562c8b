"""Compares each graph of a bundle in ONNX Runtime with ONNX's NumPy reference, using Polygraphy.

The two implementations share no code, so equal outputs confirm the graph. Inputs are states of a real stream: the
initial one, and states along the golden tokens or vectors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, inliner
from onnx.reference import ReferenceEvaluator
from polygraphy import comparator
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from .bundle import Bundle
from .errors import UsageError
from .manifest import GraphEntry
from .onnx.files import load_structure, load_weights
from .running import Arrays, BundleRunner, open_session
from .schedule import may_start

# Blockwise quantised matmuls exactly as in the graph. By default ONNX Runtime rounds their inputs to int8.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


@dataclass(frozen=True)
class OutputCheck:
    """One output of one graph: the largest difference over all states tested."""

    graph: str
    output: str
    max_abs_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; False for NaN."""
        return self.max_abs_error <= self.tolerance


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """A Polygraphy runner around onnx.reference, which implements every operator in NumPy."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="onnx-reference")
        self._path = path

    def activate_impl(self) -> None:
        """Loads the graph."""
        self._model = load_inlined(self._path)
        self._evaluator = ReferenceEvaluator(self._model)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs."""
        metadata = TensorMetadata()
        for value in self._model.graph.input:
            tensor = value.type.tensor_type
            shape = [dimension.dim_value or 1 for dimension in tensor.shape.dim]  # 1: any number of streams
            metadata.add(value.name, dtype=np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        """Runs the graph."""
        started = time.perf_counter()
        outputs = self._evaluator.run(None, dict(feed_dict))
        self.inference_time = time.perf_counter() - started
        return dict(zip(self._evaluator.output_names, outputs, strict=True))

    def deactivate_impl(self) -> None:
        """Releases the graph."""
        del self._model, self._evaluator


def load_inlined(path: Path) -> onnx.ModelProto:
    """The graph with its functions inlined, because onnx.reference ignores overloads of functions."""
    return load_weights(inliner.inline_local_functions(load_structure(path)), path.parent)


def check_graphs(bundle: Bundle, tolerance: float) -> list[OutputCheck]:
    """Compares every output of every graph. `tolerance` is absolute. Raises UsageError for low-precision memories."""
    if (memory_dtype := bundle.manifest.memory.dtype) != "float32":
        problem = f"{bundle.path} has memories in {memory_dtype}, which the ONNX reference cannot compute"
        raise UsageError("E0253", "verify", problem, "leave out the comparison of graphs")
    checks = []
    samples = _Samples(bundle)
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple  # its older name
    compare = simple(check_error_stat="max", atol=tolerance, rtol=0.0)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for graph in bundle.manifest.graphs:
            path = bundle.path / graph.file
            runners = [OnnxrtRunner(lambda path=path: _session(path), name="onnxruntime"), ReferenceRunner(path)]
            results = comparator.Comparator.run(runners, data_loader=samples.of(graph))
            compared = comparator.Comparator.compare_accuracy(results, compare_func=compare)
            pairs = compared if hasattr(compared, "items") else compared[0]  # newer releases: one per compare function
            [(_, iterations)] = pairs.items()
            for output in iterations[0]:
                worst = max(float(np.nan_to_num(iteration[output].max_absdiff, nan=np.inf)) for iteration in iterations)
                checks.append(OutputCheck(graph.name, output, worst, tolerance))
    return checks


def _session(path: Path) -> onnxruntime.InferenceSession:
    return open_session(path, config=_EXACT)


class _Samples:
    """Inputs for a graph from the golden stream."""

    def __init__(self, bundle: Bundle) -> None:
        self._runner = BundleRunner(bundle, lambda graph: _session(bundle.path / graph.file))
        self._inputs = bundle.golden().inputs
        self._states: dict[int, Arrays] = {0: bundle.initial_state()}

    def of(self, graph: GraphEntry) -> list[Arrays]:
        """Feeds from the first and the last position where the graph may start; the last two for a decode graph."""
        last = max(0, len(self._inputs) - graph.tokens)
        places = [place for place in range(last + 1) if may_start(graph, place)] or list(graph.offsets[:1])
        chosen = {places[0], *places[-2 if graph.tokens == 1 else -1 :]}
        return [self._feeds(graph, place) for place in sorted(chosen)]

    def _feeds(self, graph: GraphEntry, position: int) -> Arrays:
        inputs = np.resize(self._inputs[position:], (graph.tokens, *self._inputs.shape[1:]))
        return self._runner.feeds(graph, inputs, position, self._state(position))

    def _state(self, position: int) -> Arrays:
        """The state at that position, advanced from the nearest earlier one."""
        at = max(known for known in self._states if known <= position)
        state = self._states[at]
        for call in self._runner.stream(self._inputs[at:position], state, at):
            state = call.state
        self._states[position] = state
        return state
