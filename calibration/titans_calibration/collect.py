"""Observing a bundle over data: each matmul's input and each memory's range, call by call, resumable."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import xxhash
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from titans_calibration.data import Data
from titans_calibration.instrument import matmul_inputs, open_runner
from titans_calibration.observe import WINDOW, NotFiniteError, Observations, Observed
from titans_calibration.source import Source
from titans_export.errors import BundleError
from titans_export.files import replacing_file
from titans_export.row_fields import STORED_KINDS
from titans_export.running import Arrays, BundleRunner

SAVE_SECONDS = 10.0
SAVES_APART = 20.0  # times the duration of a save: large Gram matrices are saved less often
_VERSION = 2  # of the work file

Range = tuple[float, float]


@dataclass
class Collected:
    """observations: by matmul. memory: low and high by state tensor and field, and by window's first position."""

    observations: Observations
    memory: dict[str, dict[int, Range]] = field(default_factory=dict)
    tokens: int = 0
    resumed_at: int = 0


class _Group(NamedTuple):
    """Matmuls that share their inputs in every graph, so that they are observed once."""

    weights: list[str]
    channels: int
    values: dict[str, list[str]]  # by graph


def collect(
    source: Source,
    data: Data,
    *,
    gram: bool = False,
    work: Path | None = None,
    save_seconds: float | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Collected:
    """Runs each stream of the data from a fresh memory through the bundle's schedule, and observes.

    `work` is a file for the observations, written every `save_seconds`, or less often if that takes long. A later call
    with the same bundle, data and `gram` continues from it to the same result, bit for bit. Raises BundleError at
    the first value that is not finite.
    """
    groups = find_groups(source.structures)
    run = _Run(source, data, groups, gram)
    if work is not None:
        run.resume(work)
    resumed_at = run.done
    progress(run.done)
    every = SAVE_SECONDS if save_seconds is None else save_seconds
    saved = time.monotonic()
    # One thread: the same sums on every machine, and no NumPy threads that spin beside ONNX Runtime's.
    with threadpool_limits(1, "blas"):
        while run.stream < len(data.streams):
            progress(run.step())
            if work is not None and time.monotonic() - saved >= every:
                began = time.monotonic()
                run.save(work)
                saved = time.monotonic()
                if every:
                    every = max(every, SAVES_APART * (saved - began))
    observations = {
        name: observed for group, observed in zip(groups, run.observed, strict=True) for name in group.weights
    }
    return Collected(observations, run.memory, run.done, resumed_at)


def find_groups(models: Mapping[str, onnx.ModelProto]) -> list[_Group]:
    """The matmuls of all graphs, grouped by their inputs."""
    inputs = {graph: matmul_inputs(model) for graph, model in models.items()}
    names = sorted({name for found in inputs.values() for name in found})
    groups: dict[str, _Group] = {}
    for name in names:
        values = {graph: found[name][1] for graph, found in inputs.items() if name in found}
        channels = next(found[name][0] for found in inputs.values() if name in found)
        groups.setdefault(json.dumps(values), _Group([], channels, values)).weights.append(name)
    return list(groups.values())


class _Run:
    """A collection in progress: stream, position, state and observations."""

    _REMEDY = "check with titans-export run that the model is stable over this data, or give less of it"

    def __init__(self, source: Source, data: Data, groups: list[_Group], gram: bool) -> None:
        bundle = source.bundle
        self._bundle, self._models, self._data, self._groups, self._gram = bundle, source.structures, data, groups, gram
        # By graph: matmul inputs in the order of its nodes.
        self._shown = {
            graph: {value: name for name, (_, values) in matmul_inputs(model).items() for value in values}
            for graph, model in self._models.items()
        }
        self._runner = self._open(kernel=True)
        self._states = [entry for entry in bundle.manifest.state if entry.role == "memory" and entry.layout]
        self.observed = [Observed.empty(group.channels, gram) for group in groups]
        self.memory: dict[str, dict[int, Range]] = {}
        self.stream = self.position = self.done = 0
        self.state: Arrays = bundle.initial_state()

    def _open(self, kernel: bool) -> BundleRunner:
        shown = {graph: list(values) for graph, values in self._shown.items()}
        return open_runner(self._bundle, self._models, shown, kernel)

    def step(self) -> int:
        """Runs one call; returns its tokens."""
        tokens = self._data.streams[self.stream]
        graph = self._runner.next(self.position, len(tokens) - self.position)
        count: int = graph.tokens
        given = tokens[self.position : self.position + count]
        try:
            call = self._runner.run(graph, given, self.position, self.state)
        except Exception as error:  # ONNX Runtime raises nothing narrower; the kernel refuses what is not finite
            call = self._open(kernel=False).run(graph, given, self.position, self.state)
            self._check(graph.name, call.values)
            problem = f"ONNX Runtime cannot run the graph {graph.name}: {error}"
            raise BundleError("E0814", "quantize", problem, self._REMEDY) from error
        values, self.state = call.values, call.state
        for group, observed in zip(self._groups, self.observed, strict=True):
            for name in group.values.get(graph.name, ()):
                try:
                    observed.add(values[name], self.position)
                except NotFiniteError:
                    self._check(graph.name, values)
        self._observe_memory()
        self._check(graph.name, {self._runner.output: values[self._runner.output]})
        self.position += count
        self.done += count
        if self.position == len(tokens):
            self.stream, self.position, self.state = self.stream + 1, 0, self._bundle.initial_state()
        return count

    def _check(self, graph: str, values: Arrays) -> None:
        """Raises BundleError for the first matmul input, or the output, that is not finite."""
        for value, weight in {**self._shown[graph], self._runner.output: None}.items():
            if value in values and not np.isfinite(values[value]).all():
                name = f"the input of {weight}" if weight else f"the output {value}"
                bad = values[value][~np.isfinite(values[value])]
                raise self._not_finite(name, float(bad.flat[0]))

    def _observe_memory(self) -> None:
        window = self.position // WINDOW * WINDOW
        for entry in self._states:
            row = self.state[entry.name]
            for part in entry.layout:
                if part.kind not in STORED_KINDS:
                    continue
                values = row[..., part.offset : part.offset + int(np.prod(part.shape))]
                low, high = float(values.min()), float(values.max())
                name = f"{entry.name}.{part.name}"
                if not np.isfinite(low) or not np.isfinite(high):
                    raise self._not_finite(name, low if not np.isfinite(low) else high)
                ranges = self.memory.setdefault(name, {})
                before = ranges.get(window, (np.inf, -np.inf))
                ranges[window] = (min(before[0], low), max(before[1], high))

    def _not_finite(self, name: str, value: float) -> BundleError:
        source = self._data.sources[self.stream]
        problem = f"{name} is not finite: {value} in the call at position {self.position} of {source}"
        return BundleError("E0808", "quantize", problem, self._REMEDY)

    def _key(self) -> str:
        """Identifies the bundle, the data and the options that a work file belongs to."""
        parts = [_VERSION, json.dumps(self._bundle.manifest.raw, sort_keys=True), self._data.xxh3_128, self._gram]
        return xxhash.xxh3_128_hexdigest(repr(parts).encode())

    def save(self, path: Path) -> None:
        """Writes the work file, renamed into place atomically."""
        arrays: dict[str, NDArray[Any]] = {f"state/{name}": value for name, value in self.state.items()}
        table = []
        for number, o in enumerate(self.observed):
            arrays |= {f"{number}/channels": o.channels, f"{number}/sum_abs": o.sum_abs, f"{number}/counts": o.counts}
            if o.gram is not None:
                arrays |= {f"{number}/gram/{part}": values for part, values in enumerate(o.gram.parts)}
            table.append([o.count, o.low, o.high, o.limit, sorted((w, *r) for w, r in o.window_ranges.items())])
        memory = {name: sorted((w, *r) for w, r in ranges.items()) for name, ranges in self.memory.items()}
        facts = {
            "key": self._key(), "stream": self.stream, "position": self.position, "done": self.done,
            "observed": table, "memory": memory,
        }  # fmt: skip
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        with replacing_file(path) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def resume(self, path: Path) -> None:
        """Continues from the work file if it is complete and has the same key."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            facts = json.loads(arrays["facts"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        if facts["key"] != self._key():
            return
        for number, (o, (count, low, high, limit, windows)) in enumerate(
            zip(self.observed, facts["observed"], strict=True)
        ):
            o.count, o.low, o.high, o.limit = count, low, high, limit
            o.channels, o.sum_abs = arrays[f"{number}/channels"], arrays[f"{number}/sum_abs"]
            o.counts = arrays[f"{number}/counts"]
            if o.gram is not None:
                o.gram.parts = [arrays[f"{number}/gram/{part}"] for part in range(len(o.gram.parts))]
            o.window_ranges = {window: (a, b) for window, a, b in windows}
        self.memory = {name: {window: (a, b) for window, a, b in rows} for name, rows in facts["memory"].items()}
        self.stream, self.position, self.done = facts["stream"], facts["position"], facts["done"]
        self.state = {name.removeprefix("state/"): v for name, v in arrays.items() if name.startswith("state/")}
