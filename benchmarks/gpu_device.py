"""Runs a bundle on a device through the runtime: golden logits, a long stream against the CPU, times and power."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans_export.bundle import Bundle, read_bundle
from titans_export.errors import MachineError, MismatchError, TitansError
from titans_export.manifest import NO_ENGINE, EngineEntry
from titans_export.verifying import verify_stream

if TYPE_CHECKING:
    import titans_runtime

WHERE = "device"
# Tolerance of logits against the golden ones by precision of matmuls, as a share of the largest: 2^-11 and 2^-8 per
# rounding, with a few dozen roundings in a row. The bundle's tolerance applies to fp32.
RELATIVE = {"fp16": 1e-2, "bf16": 8e-2}
STEPS, WARM_UP = 500, 50
BLOCK = 4096


def open_session(bundle: Path, backend: str, engine: str | None = None, device: str = "cuda") -> titans_runtime.Session:
    """Opens the bundle on the device with that backend. Raises TitansError with the runtime's message."""
    try:
        import titans_runtime
    except ImportError as error:
        problem = f"cannot import titans_runtime: {error}"
        raise MachineError("E1101", WHERE, problem, "pip install ./runtime/python") from error
    try:
        return titans_runtime.Session(bundle, device, backend, engine=engine)
    except titans_runtime.Error as error:
        kind = MachineError if error.status == 4 else TitansError
        problem = f"{bundle.name} does not open on {device} with {backend}: {error}"
        raise kind("E0911", WHERE, problem, "see that message") from error


def find_engine(bundle: Bundle, backend: str, name: str | None) -> EngineEntry | None:
    """The engine to run; None for the plain graphs, which only ONNX Runtime opens."""
    found = [e for e in bundle.manifest.engines if e.compiler == backend and name in (None, e.name)]
    if found:
        return found[0]
    if backend == "onnxruntime" and name is None:
        return None
    got = ", ".join(f"{e.name} ({e.compiler})" for e in bundle.manifest.engines) or "none"
    problem = f"{bundle.path.name} has no engine of {name or backend}, only {got}"
    raise MachineError("E0908", WHERE, problem, "run titans-export build with a target of this machine")


def run_bundle(bundle: Path, backend: str, tokens: int, engine: str | None = None, device: str = "cuda") -> Any:
    """Checks golden logits with three ways to cut the stream, compares a long stream with the CPU, and times the
    device.
    """
    opened = read_bundle(bundle)
    record = find_engine(opened, backend, engine)
    with open_session(bundle, backend, record.name if record else NO_ENGINE, device) as session:
        found: dict[str, Any] = {
            "engine": record.name if record else None,
            "precision": record.precision if record else "fp32",
            "alias": record.alias if record else None,
            "backend_version": session.info["backend_version"],
            "memory_kernel": session.info["memory_kernel"],
            "in_place": [state["name"] for state in session.info["state"] if state["in_place"]],
        }
        golden = opened.golden()
        tolerance = allowed(opened, found["precision"], golden.largest)
        report = verify_stream(session, golden.inputs, golden, tolerance)
        found |= {"golden_max_abs_error": report.max_abs_error, "golden_tolerance": tolerance}
        if not report.passed:
            got = f"{report.max_abs_error:.3g} at position {report.first_bad_position}"
            problem = f"outputs differ from the golden ones: expected at most {tolerance:.3g}, got {got}"
            raise MismatchError("E0901", WHERE, problem, "compare layer by layer")
        found |= times(session)
        if tokens:
            with open_session(bundle, "onnxruntime", "none", "cpu") as reference:
                found |= long_stream(session, reference, tokens, tolerance)
    return found


def allowed(bundle: Bundle, precision: str, largest: float) -> float:
    return RELATIVE[precision] * largest if precision in RELATIVE else bundle.tolerance


def times(session: titans_runtime.Session) -> dict[str, float]:
    """Decode latencies in microseconds, and prefill in tokens per second with the largest graph, timed on the host."""
    rng = np.random.default_rng(0)
    largest = max(graph["tokens"] for graph in session.info["graphs"])
    stream = session.stream()
    taken = []
    for token in rng.integers(0, session.vocab_size, WARM_UP + STEPS):
        began = time.perf_counter_ns()
        stream.step(int(token))
        taken.append(time.perf_counter_ns() - began)
    steps = sorted(taken[WARM_UP:])
    stream.reset()
    block = rng.integers(0, session.vocab_size, 16 * largest).astype(np.int32)
    stream.feed(block, outputs="last")
    rounds: list[float] = []
    for _ in range(5):
        began = time.perf_counter_ns()
        stream.feed(block, outputs="last")
        rounds.append((time.perf_counter_ns() - began) / 1e9)
    return {
        "decode_p50_us": statistics.median(steps) / 1e3,
        "decode_p99_us": steps[int(0.99 * len(steps))] / 1e3,
        "prefill_tokens_per_s": len(block) / statistics.median(rounds),
    }


def long_stream(
    session: titans_runtime.Session, reference: titans_runtime.Session, tokens: int, tolerance: float
) -> dict[str, Any]:
    """Runs the same random tokens through both sessions. Reports whether all logits are finite, and the largest
    difference.
    """
    rng = np.random.default_rng(1)
    ours, theirs = session.stream(), reference.stream()
    worst, began = 0.0, time.monotonic()
    for start in range(0, tokens, BLOCK):
        block = rng.integers(0, session.vocab_size, min(BLOCK, tokens - start)).astype(np.int32)
        got, right = ours.feed(block), theirs.feed(block)
        assert got is not None and right is not None
        distance = float(np.abs(got - right).max())
        if not np.isfinite(distance):
            problem = f"NaN or infinity in the logits by token {start + len(block)}"
            raise MismatchError("E0904", WHERE, problem, "report it")
        worst = max(worst, distance)
    if worst > tolerance:
        problem = (
            f"outputs differ from the CPU's over {tokens} tokens: expected at most {tolerance:.3g}, got {worst:.3g}"
        )
        raise MismatchError("E0901", WHERE, problem, "compare layer by layer")
    return {"stream_tokens": tokens, "stream_max_abs_error": worst, "stream_s": time.monotonic() - began}


@contextlib.contextmanager
def power(found: dict[str, Any]) -> Iterator[None]:
    """Adds the power mode, and the board's readings while the block runs, to `found`."""
    found["power_mode"] = _ask(["nvpmodel", "-q"])
    sampler = shutil.which("tegrastats")
    process = None
    if sampler:
        process = subprocess.Popen([sampler, "--interval", "1000"], stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            out, _ = process.communicate(timeout=10)
            found["tegrastats"] = out.strip().splitlines()[:10]
        else:
            query = "power.draw,clocks.sm,clocks.mem,temperature.gpu"
            found["nvidia_smi"] = _ask(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])


def _ask(command: list[str]) -> str | None:
    """The command's output, or None if the program is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
