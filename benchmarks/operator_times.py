"""Profiles a bundle's graphs: operator times from ONNX Runtime's profiler, grouped by kind.

Graphs run with our custom operators and the runtime's settings, driven from Python. Calls use arbitrary states, because
a call's work depends on its position only.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from titans_export.bench.worker import Worker
from titans_export.bundle import Bundle
from titans_export.manifest import read_manifest
from titans_export.running import BundleRunner, open_session
from titans_export.schedule import calls

GROUPS = {
    "matmuls": ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "Einsum"),
    "memory kernel": ("NeuralMemory", "ChunkNeuralMemory"),
    "hyper-connections": ("HyperConnection",),
}
REST = "other"
WARM_UP, REPEATS = 3, 20
MOST_OPERATORS = 12  # that are listed by name


def group_of(operator: str) -> str:
    """The group of an operator type."""
    return next((group for group, members in GROUPS.items() if operator in members), REST)


def node_times(events: Iterable[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Microseconds and calls of each operator type, from the kernel events of an ONNX Runtime profile.

    Nodes with subgraphs are left out: their inner nodes count, and their own time includes those.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and operator not in _CONTAINERS:
            times[operator].append(float(event["dur"]))
    return {operator: (sum(each), len(each)) for operator, each in times.items()}


_CONTAINERS = ("If", "Loop", "Scan")


def custom_operators() -> Path:
    """The library of custom operators that the runtime opens."""
    import titans_runtime

    return Path(str(titans_runtime.__file__)).with_name("libtitans_onnxruntime_ops.so")


class Profiler:
    """Runs in a worker: a bundle's graphs in ONNX Runtime."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._bundle, self._threads = Bundle(bundle, read_manifest(bundle)), threads

    def times(self, made: list[tuple[str, int]]) -> dict[str, tuple[float, int]]:
        """The mean over several repeats of the calls (graph and position), run in sequence."""
        total: dict[str, tuple[float, int]] = {}
        for name in dict.fromkeys(name for name, _ in made):
            positions = [position for graph, position in made if graph == name]
            for operator, (time, count) in self._graph(name, positions).items():
                before = total.get(operator, (0.0, 0))
                total[operator] = before[0] + time, before[1] + count
        return total

    def _graph(self, name: str, positions: list[int]) -> dict[str, tuple[float, int]]:
        import onnxruntime as ort

        graph = self._bundle.manifest.graph(name)
        state = self._bundle.initial_state()
        inputs = np.zeros(graph.tokens, np.int64)
        with tempfile.TemporaryDirectory() as folder:
            # As in runtime/src/backends/onnxruntime/graph_session.cpp.
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = open_session(self._bundle.path / graph.file, kernel=custom_operators(), options=options)
            runner = BundleRunner(self._bundle, lambda graph: session)
            for _ in range(WARM_UP + REPEATS):
                for position in positions:
                    runner.run(graph, inputs, position, state)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _without_warm_up(events, len(positions))


def _without_warm_up(events: list[dict[str, Any]], calls: int) -> dict[str, tuple[float, int]]:
    """The mean repeat, of this many calls. Events that began before the end of the last warm-up call are left out."""
    runs = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    since = runs[WARM_UP * calls - 1]
    found = node_times(event for event in events if event["ts"] >= since)
    return {operator: (time / REPEATS, count // REPEATS) for operator, (time, count) in found.items()}


def schedule(bundle: Bundle, position: int, count: int) -> list[tuple[str, int]]:
    """The calls (graph and position) of a feed of `count` tokens."""
    return [(graph.name, at) for at, graph in calls(bundle.manifest.graphs, position, count)]


def profile(bundle: Bundle, threads: int, prompt_tokens: int) -> dict[str, Any]:
    """Microseconds per call, by group and by operator, of prefill and decode.

    Prefill is one call of the largest graph. Decode takes each token of one schedule period, after the prompt.
    """
    largest = max(graph.tokens for graph in bundle.manifest.graphs)
    period = max(graph.stride for graph in bundle.manifest.graphs)
    start = prompt_tokens // period * period
    tokens = [call for at in range(start, start + period) for call in schedule(bundle, at, 1)]
    plans = {"prefill": (schedule(bundle, 0, largest), 1), "decode": (tokens, period)}
    found = {}
    with Worker("benchmarks.operator_times:Profiler", bundle.path, threads, threads=threads) as worker:
        for kind, (made, share) in plans.items():
            found[kind] = {"tokens": largest if kind == "prefill" else 1, **summary(worker.call("times", made), share)}
    return found


def summary(times: dict[str, tuple[float, int]], calls: int) -> dict[str, Any]:
    """Microseconds of the mean call: total, by group, and for the slowest operators."""
    groups = dict.fromkeys((*GROUPS, REST), 0.0)
    for operator, (time, _) in times.items():
        groups[group_of(operator)] += time / calls
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:MOST_OPERATORS]
    return {
        "us": sum(groups.values()),
        "nodes": sum(count for _, count in times.values()) / calls,
        "groups_us": groups,
        "operators": [
            {"operator": operator, "group": group_of(operator), "us": time / calls, "nodes": count / calls}
            for operator, (time, count) in longest
        ],
    }
