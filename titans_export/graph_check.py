"""Each graph of a bundle in ONNX Runtime against ONNX's own NumPy reference, compared by Polygraphy.

The two share no code, so what they agree on is what the graph says. They are fed states that a stream really has: the
fresh one, and those after the golden tokens or vectors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, inliner
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from polygraphy import comparator
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from .bundle import Bundle
from .errors import UsageError
from .schedule import may_start, next_graph, offsets

Arrays = dict[str, npt.NDArray[Any]]
_PROVIDERS = ["CPUExecutionProvider"]


@dataclass(frozen=True)
class OutputCheck:
    """One output of one graph: the largest difference over all states it was fed from."""

    graph: str
    output: str
    max_abs_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.max_abs_error <= self.tolerance


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """A Polygraphy runner around onnx.reference, an implementation of every operator in NumPy."""

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
            shape = [dimension.dim_value for dimension in tensor.shape.dim]
            metadata.add(value.name, dtype=np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        """Runs the graph."""
        started = time.perf_counter()
        outputs = self._evaluator.run(None, dict(feed_dict))
        self.inference_time = time.perf_counter() - started
        return dict(zip(self._evaluator.output_names, outputs, strict=True))

    def deactivate_impl(self) -> None:
        """Lets go of the graph."""
        del self._model, self._evaluator


def load_inlined(path: Path) -> onnx.ModelProto:
    """The graph with its functions written out, as onnx.reference does not tell overloads of a function apart."""
    model = onnx.load(str(path), load_external_data=False)
    model = inliner.inline_local_functions(model)
    load_external_data_for_model(model, str(path.parent))
    return model


def check_graphs(bundle: Bundle, tolerance: float) -> list[OutputCheck]:
    """Compares every output of every graph. `tolerance` is absolute. Raises UsageError for memories in few bits."""
    memory_dtype = (bundle.quantization or {}).get("memory", {}).get("dtype", "float32")
    if memory_dtype != "float32":
        raise UsageError(
            "verify", "memories in float32, which ONNX's reference can compute",
            f"{bundle.path} with memories in {memory_dtype}",
            "leave the comparison of graphs out; the runtime's own outputs are compared all the same",
        )  # fmt: skip
    checks = []
    samples = _Samples(bundle)
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple  # its older name
    compare = simple(check_error_stat="max", atol=tolerance, rtol=0.0)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for graph in bundle.manifest["graphs"]:
            path = bundle.path / graph["file"]
            runners = [OnnxrtRunner(lambda path=path: _session(path), name="onnxruntime"), ReferenceRunner(path)]
            results = comparator.Comparator.run(runners, data_loader=samples.of(graph))
            compared = comparator.Comparator.compare_accuracy(results, compare_func=compare)
            pairs = compared if hasattr(compared, "items") else compared[0]  # newer releases: one per compare function
            [(_, iterations)] = pairs.items()
            for output in iterations[0]:
                worst = max(float(np.nan_to_num(iteration[output].max_absdiff, nan=np.inf)) for iteration in iterations)
                checks.append(OutputCheck(graph["name"], output, worst, tolerance))
    return checks


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Products with weights in blocks as the graph has them; by default their inputs are rounded to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=_PROVIDERS)


class _Samples:
    """Inputs for a graph from the golden stream."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._graphs: list[dict[str, Any]] = self._manifest["graphs"]
        self._sessions = {graph["name"]: _session(bundle.path / graph["file"]) for graph in self._graphs}
        self._given = bundle.golden()[0].astype(np.float32 if bundle.takes_vectors else np.int64)
        self._states: dict[int, Arrays] = {0: bundle.initial_state()}

    def of(self, graph: dict[str, Any]) -> list[Arrays]:
        """From the first place where the graph can run, and from the last ones: for one token, the last two."""
        last = max(0, len(self._given) - graph["tokens"])
        places = [place for place in range(last + 1) if may_start(graph, place)] or offsets(graph)[:1]
        chosen = {places[0], *places[-2 if graph["tokens"] == 1 else -1 :]}
        return [self._inputs(graph, place, self._state(place)) for place in sorted(chosen)]

    def _inputs(self, graph: dict[str, Any], position: int, state: Arrays) -> Arrays:
        given = np.resize(self._given[position:], (graph["tokens"], *self._given.shape[1:]))
        return {
            self._manifest["input"]["name"]: given[None],
            self._manifest["controls"]["position"]: np.array([position], np.int64),
            self._manifest["controls"]["learn"]: np.array([True]),
            **{entry["input"]: state[entry["name"]] for entry in self._manifest["state"]},
        }

    def _state(self, position: int) -> Arrays:
        """The state there, from the nearest known one on by the schedule of docs/bundle.md."""
        at = max(known for known in self._states if known <= position)
        state = self._states[at]
        while at < position:
            graph = next_graph(self._graphs, at, position - at)
            session = self._sessions[graph["name"]]
            names = [value.name for value in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, self._inputs(graph, at, state)), strict=True))
            state = {entry["name"]: outputs[entry["output"]] for entry in self._manifest["state"]}
            at += graph["tokens"]
        self._states[position] = state
        return state
