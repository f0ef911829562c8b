"""Where the time of a bundle's graphs goes: operators' times from ONNX Runtime's own profiler, grouped by kind.

Graphs run with our custom operators and the runtime's settings, driven from Python. A token's state is its graph's
input, whatever it holds: which work a call does depends on its position alone.
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
MOST_OPERATORS = 12  # that are named


def group_of(operator: str) -> str:
    """The group that an operator type is counted in."""
    return next((group for group, members in GROUPS.items() if operator in members), REST)


def node_times(events: Iterable[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Microseconds and calls of each operator type, of what a profile of ONNX Runtime says of kernels.

    A node with graphs of its own counts as what is in them: its own time has theirs in it.
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
    """In a worker: a bundle's graphs in ONNX Runtime."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._bundle, self._threads = Bundle(bundle, read_manifest(bundle)), threads

    def times(self, made: list[tuple[str, int]]) -> dict[str, tuple[float, int]]:
        """The mean over some repeats of the calls, graph and position each, one after the other."""
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
            # As runtime/src/backends/onnxruntime/graph_session.cpp sets them.
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
    """A mean repeat of so many calls each; whatever began before the last warm-up call ended is left out."""
    runs = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    since = runs[WARM_UP * calls - 1]
    found = node_times(event for event in events if event["ts"] >= since)
    return {operator: (time / REPEATS, count // REPEATS) for operator, (time, count) in found.items()}


def schedule(bundle: Bundle, position: int, count: int) -> list[tuple[str, int]]:
    """The calls, graph and position, that a feed of `count` tokens makes."""
    return [(graph.name, at) for at, graph in calls(bundle.manifest.graphs, position, count)]


def profile(bundle: Bundle, threads: int, prompt_tokens: int) -> dict[str, Any]:
    """Of prefill, one call of the largest graph; of decode, each token of a period of the schedule on its own, after a
    prompt of so many tokens: microseconds a call, by group and by operator.
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
    """Microseconds of a mean call in all, by group, and of the operators that take most."""
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
