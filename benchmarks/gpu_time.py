"""Times rows on a GPU: the kernel in its own program, PyTorch, and the device's limits.

Times are device times from CUDA events, without the host's cost of a call. PyTorch without a graph is an exception,
because the device then waits for its launches.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import TOLERANCES, Row, read_answer, small, write_case
from benchmarks.gpu_torch import FORMS, PRECISIONS, WAYS, Form, Way, precision
from benchmarks.reference import errors, recurrence
from titans_export.bench.statistics import Speed, summarise
from titans_export.errors import TitansError

PASSES, WARM_UP = 30, 3
DEVICE = "cuda"
MIB = 1 << 20
COPY_BYTES, PRODUCT = 1024 * MIB, 8192


def measure_limits(tries: int = 10) -> dict[str, float]:
    """The device's limits, the best of several tries: copies (reads and writes both count) and large matmuls."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    limits = {"copy_gb_s": 2 * COPY_BYTES / min(time_events(partial(target.copy_, source), tries))}
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda") for _ in range(2))
    for name in PRECISIONS:
        with precision("tf32" if name == "tf32" else "float32", "cuda"):
            x, y = (a.bfloat16(), b.bfloat16()) if name == "bfloat16" else (a, b)
            out = torch.empty_like(x)
            taken = min(time_events(partial(torch.mm, x, y, out=out), tries))
        limits[f"matrix_{name}_tflops"] = 2 * PRODUCT**3 / taken / 1e3
    return limits


def time_events(work: Callable[[], Any], passes: int) -> list[int]:
    """Nanoseconds of device time of each run of `work`, after warm-up runs."""
    for _ in range(WARM_UP):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(passes)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [max(1, round(begin.elapsed_time(end) * 1e6)) for begin, end in events]


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Captures `work` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def entry(row: Row, name: str, right: Any, answer: Any, tolerance: float, nanoseconds: Callable[[], list[int]]) -> Any:
    """The result of one baseline in a row: its errors, and its speed unless the errors are too large."""
    wrong = errors(answer, {key: value for key, value in right.items() if key in answer})
    found: dict[str, Any] = {"name": name, "errors": wrong, "tolerance": tolerance}
    found["passed"] = max(wrong.values()) <= tolerance
    if found["passed"]:
        speed = summarise([[[taken] for taken in nanoseconds()]], row.case.streams * row.case.tokens)
        found |= {"speed": dataclasses.asdict(speed), **in_units(row, speed)}
    return found


def in_units(row: Row, speed: Speed) -> dict[str, float]:
    """The speed in the units of the limits."""
    case = row.case
    seconds = case.streams * case.tokens / speed.tokens_per_second
    return {
        "us_per_pass": seconds * 1e6,
        "us_per_chunk": seconds * 1e6 * case.chunk / case.tokens,
        "us_per_token_of_all_streams": seconds * 1e6 / case.tokens,
        "tflops": row.flop_per_pass / seconds / 1e12,
        "gb_s": row.bytes_per_pass / seconds / 1e9,
    }


def time_kernel(row: Row, program: Path, right: Any) -> list[dict[str, Any]]:
    """Times the kernel, launched one by one and as a graph."""
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        case, out = Path(folder, "case.safetensors"), Path(folder, "out.bin")
        write_case(small(row), case)
        _run([program, case, out])
        answer = read_answer(small(row), out)
        write_case(row, case)
        found = []
        for name, options in (("kernel", []), ("kernel, one CUDA graph", ["--graph"])):
            printed: dict[str, Any] = {}

            def times(options: list[str] = options, printed: dict[str, Any] = printed) -> list[int]:
                printed |= _run([program, case, out, "--time", str(WARM_UP + PASSES), *options])
                return [max(1, round(taken)) for taken in printed["ns"][WARM_UP:]]

            timed = entry(row, name, right, answer, row.tolerance, times)
            found.append({**timed, "placement": printed.get("placement"), "matrix_operands": row.values})
        return found


def products_of(row: Row) -> tuple[str, ...]:
    """The dtypes of PyTorch's matmuls in a row: the kernel's, and TF32, which users of float32 may allow.

    Decode uses each matrix once, so rounding it first gains nothing.
    """
    if row.case.kind == "decode":
        return ("float32",)
    return ("bfloat16",) if row.values == "bfloat16" else ("float32", "tf32")


def time_torch(row: Row, right: Any, until: float) -> list[dict[str, Any]]:
    """Times every form, way and precision. Compiled ones start only before the deadline. Failures are recorded with a
    reason.
    """
    found = []
    for kind in FORMS[row.case.kind]:
        for way in WAYS:
            for products in products_of(row):
                name = f"{way.name}, {kind.__name__}, {products}"
                if way.mode is not None and time.monotonic() > until:
                    found.append({"name": name, "passed": None, "unavailable": "no time was left to compile it"})
                    continue
                try:
                    with torch.inference_mode(), precision(products, DEVICE):
                        found.append(_time_form(row, kind, way, products, name, right))
                except Exception as error:  # a compiler's failure is a result and does not end the run
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    found.append({"name": name, "passed": None, "unavailable": reason})
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    return found


def _time_form(row: Row, kind: type[Form], way: Way, products: str, name: str, right: Any) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = max(64, row.case.chunk)
    answer = kind(small(row).case, DEVICE, way.mode).answer()
    began = time.monotonic()

    def times() -> list[int]:
        form = kind(row.case, DEVICE, way.mode)
        form.reset()
        form.run()  # compiles
        work = captured(form.run) if way.graph else form.run
        return time_events(work, PASSES)

    timed = entry(row, name, right, answer, TOLERANCES[products], times)
    return {**timed, "matrix_operands": products, "setup_s": time.monotonic() - began}


def time_row(row: Row, program: Path, limits: dict[str, float], until: float) -> dict[str, Any]:
    """Times a row with all its baselines, and compares it with the project's goal."""
    right = recurrence(small(row).case)
    ours = time_kernel(row, program, right)
    theirs = time_torch(row, right, until)
    return {
        "name": row.name,
        **{key: value for key, value in dataclasses.asdict(row.case).items() if key not in ("name", "threads")},
        "values": row.values,
        "memory_dtype": row.memory_dtype,
        "rounding": row.rounding,
        "baselines": ours + theirs,
        **verdict(row, ours, theirs, limits),
    }


def verdict(
    row: Row, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], limits: dict[str, float]
) -> dict[str, Any]:
    """The kernel's best time against the limit, the goal, and PyTorch's best."""
    best = _fastest(ours)
    if best is None:
        return {"share_of_limit": None, "reached": None, "times_torch": {}}
    if row.bound_by == "matrix":
        share = best["tflops"] / limits[f"matrix_{row.values}_tflops"]
    else:
        share = best["gb_s"] / limits["copy_gb_s"]
    reached = None
    if row.reach_share is not None:
        reached = share >= row.reach_share
    elif row.reach_us_per_chunk is not None:
        reached = best["us_per_chunk"] <= row.reach_us_per_chunk
    groups = {
        "compile": [x for x in theirs if "compile" in x["name"]],
        "eager": [x for x in theirs if "eager" in x["name"]],
        "any": theirs,
    }
    fastest = {name: _fastest(group) for name, group in groups.items()}
    return {
        "bound_by": row.bound_by,
        "share_of_limit": share,
        "reach_share": row.reach_share,
        "reach_us_per_chunk": row.reach_us_per_chunk,
        "reached": reached,
        "times_torch": {
            name: found["us_per_pass"] / best["us_per_pass"] for name, found in fastest.items() if found is not None
        },
    }


def _fastest(baselines: list[dict[str, Any]]) -> dict[str, Any] | None:
    right = [baseline for baseline in baselines if baseline["passed"]]
    return min(right, key=lambda baseline: float(baseline["us_per_pass"]), default=None)


def _run(command: list[Any]) -> dict[str, Any]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        got = done.stderr.strip() or f"exit code {done.returncode}"
        raise TitansError("E1106", "gpu_check", f"{Path(command[0]).name} failed: {got}", "run --part build again")
    printed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return printed
