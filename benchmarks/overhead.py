"""Measures the cost of a decoded token in the runtime beyond its ONNX Runtime call.

    python -m benchmarks.overhead build/bench/mac-bytes.titans -o overhead.json

The floor is ONNX Runtime alone with the same graph, weights, memory kernel, options and state. Its inputs and outputs
are bound once, the state is updated in place, and Python calls it directly. The floor is compared with the C function
titans_stream_step, called the same way with and without a guard, and with Stream.step of the Python package.

All consume the same tokens in interleaved rounds and must end with identical logits. Each number covers whole rounds,
so chunk updates count. There is one thread, and only its CPU time counts. This reduces the effect of other processes
but not that of shared caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from safetensors.numpy import load_file

import titans_runtime
from benchmarks.report import provenance, write
from titans_export.bench.machine import others_busy
from titans_export.manifest import read_manifest
from titans_runtime._library import FloatPointer, lib

KERNEL = Path(titans_runtime.__file__).with_name("libtitans_onnxruntime_ops.so")
Step = Callable[[int], None]


class Engine:
    """The decode graph on ONNX Runtime alone. Two bindings alternate for state tensors that swap buffers."""

    def __init__(self, bundle: Path, in_place: dict[str, bool]) -> None:
        manifest = read_manifest(bundle)
        (graph,) = (one for one in manifest.graphs if one.tokens == 1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.use_deterministic_compute = True
        options.register_custom_ops_library(str(KERNEL))
        weights = load_file(bundle / manifest.weights.file)
        self._kept: list[Any] = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in graph.weights]
        for name, value in zip(graph.weights, self._kept, strict=True):
            options.add_initializer(name, value)
        session = onnxruntime.InferenceSession(str(bundle / graph.file), options, providers=["CPUExecutionProvider"])
        self._run = session._sess.run_with_iobinding
        self._token = np.zeros((1, 1), np.int64)
        self._position = np.zeros(1, np.int64)
        self.logits = np.zeros((1, 1, manifest.output.size), np.float32)
        inputs = {
            manifest.input.name: self._token,
            manifest.controls.position: self._position,
            manifest.controls.learn: np.ones(1, np.bool_),
            **({slots: np.zeros(1, np.int64)} if (slots := manifest.controls.slots) else {}),
        }
        initial = load_file(bundle / manifest.initial_state.file)
        sets = [{name: aligned(value) for name, value in initial.items()} for _ in range(2)]
        for name, single in in_place.items():
            if single:
                sets[1][name] = sets[0][name]
        self._bindings = []
        for now, then in (sets, sets[::-1]):
            binding = session.io_binding()
            given = {**inputs, **{state.input: now[state.name] for state in manifest.state}}
            made = {manifest.output.name: self.logits}
            made.update({state.output: then[state.name] for state in manifest.state})
            for bind, arrays in ((binding.bind_input, given), (binding.bind_output, made)):
                for name, array in arrays.items():
                    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._bindings.append(binding._iobinding)
            self._kept += [binding, given, made]
        self._kept.append(session)

    def step(self, token: int) -> None:
        self._token[0, 0] = token
        self._run(self._bindings[self._position[0] & 1], None)
        self._position[0] += 1


def aligned(value: np.ndarray) -> np.ndarray:
    """A copy aligned to a cache line, like the runtime's buffers."""
    room = np.zeros(value.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


class CInterface:
    """Calls titans_stream_step directly."""

    def __init__(self, stream: titans_runtime.Stream, size: int) -> None:
        self.logits = np.zeros(size, np.float32)
        self._stream, self._handle = stream, stream._open()
        self._out = self.logits.ctypes.data_as(FloatPointer)
        self._call = lib.titans_stream_step

    def step(self, token: int) -> None:
        if self._call(self._handle, token, self._out) != 0:
            raise RuntimeError(lib.titans_last_error().decode())


class Package:
    """Calls Stream.step."""

    def __init__(self, stream: titans_runtime.Stream) -> None:
        self.logits = np.zeros(0, np.float32)
        self._stream = stream

    def step(self, token: int) -> None:
        self.logits = self._stream.step(token)


def time_turn(step: Step, tokens: list[int]) -> float:
    """Microseconds per token."""
    start = time.thread_time_ns()
    for token in tokens:
        step(token)
    return (time.thread_time_ns() - start) / len(tokens) / 1e3


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=41, show_default=True)
@click.option("--turn", type=click.IntRange(1), default=256, show_default=True, help="Tokens per round.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def main(bundle: Path, rounds: int, turn: int, output: Path | None) -> None:
    session = titans_runtime.Session(bundle, threads=1, memory_kernel="require", engine="none")
    in_place = {state["name"]: state["in_place"] for state in session.info["state"]}
    guarded = session.stream()
    guarded.guard("skip", max_surprise=1e30)
    baselines: dict[str, Any] = {
        "engine": Engine(bundle, in_place),
        "runtime": CInterface(session.stream(), session.output_size),
        "guarded": CInterface(guarded, session.output_size),
        "python": Package(session.stream()),
    }
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in baselines}
    names = list(baselines)
    for round_ in range(rounds + 1):
        tokens = random.integers(0, session.vocab_size, turn).tolist()
        for at in range(len(names)):
            name = names[(at + round_) % len(names)]
            us = time_turn(baselines[name].step, tokens)
            if round_ > 0:  # the first is a warm-up
                times[name].append(us)
    judge = baselines["engine"].logits.ravel()
    for name, baseline in baselines.items():
        if not np.array_equal(baseline.logits, judge) and name != "engine":
            raise SystemExit(f"[overhead] the logits of {name} differ from the engine's")
    assert guarded.guard_report.rollbacks == 0
    floor = np.array(times["engine"])
    found = {}
    for name, took in times.items():
        # Differences are taken per round, so that slow phases of the machine affect both sides.
        over = np.array(took) - floor
        found[name] = {
            "us_per_token": float(np.median(took)),
            "over_engine_us": float(np.median(over)),
            "over_engine": float(np.median(over / floor)),
            "over_engine_quartiles": [float(value) for value in np.percentile(over / floor, (25, 75))],
        }
        click.echo(f"{name:8} {np.median(took):8.2f} us  {np.median(over):+6.2f} us  {np.median(over / floor):+7.2%}")
    if output is not None:
        source = provenance()
        facts = {
            "bundle": bundle.name,
            "rounds": rounds,
            "turn": turn,
            "others_busy": others_busy(),
        }
        write(output, {"benchmark": "overhead", **facts, "baselines": found, **source})


if __name__ == "__main__":
    main()
