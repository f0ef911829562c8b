"""Measures this machine's limits in the same run: large and small matmuls, reading and copying.

Each limit is the best of several tries and of all calls of `measure`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import Case
from titans_export.bench.worker import Worker
from titans_export.errors import MachineError

BANDWIDTH = Path(__file__).parents[1] / "build" / "bench" / "bandwidth"
MIB = 1 << 20
WORKING_SETS = tuple(size * MIB for size in (1, 4, 16, 64, 256))
# Old OpenBLAS builds compute wrong results without these, but they slow down current ones.
OPENBLAS_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
SIZE, TRIES, SMALL_TRIES = 2048, 10, 200


class TorchLimits:
    """Runs in a worker: matmuls by PyTorch's library."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def measure(self, shapes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
        """1e9 FLOP per second of a large matmul and of each (batch, M, K, N)."""
        import torch

        def rate(batch: int, m: int, k: int, n: int, tries: int) -> float:
            a, b, out = torch.randn(batch, m, k), torch.randn(batch, k, n), torch.empty(batch, m, n)
            return 2 * batch * m * k * n / _best(lambda: torch.bmm(a, b, out=out), tries) / 1e9

        with torch.inference_mode():
            batched = {"x".join(map(str, shape)): rate(*shape, tries=SMALL_TRIES) for shape in shapes}
            return {"sgemm": rate(1, SIZE, SIZE, SIZE, TRIES), "batched": batched}


class NumpyLimits:
    """Runs in a worker: a large matmul by NumPy's library."""

    def __init__(self, threads: int) -> None:
        from threadpoolctl import threadpool_info, threadpool_limits

        self._limit = threadpool_limits(threads)
        self._libraries = threadpool_info

    def measure(self) -> dict[str, Any]:
        """1e9 FLOP per second, and the library and kernel that were used."""
        a, b = (np.random.default_rng(i).random((SIZE, SIZE), np.float32) for i in (0, 1))
        out = np.empty_like(a)
        rate = 2 * SIZE**3 / _best(lambda: np.matmul(a, b, out=out), TRIES) / 1e9
        blas: dict[str, Any] = next((x for x in self._libraries() if x["user_api"] == "blas"), {})
        name = " ".join(str(blas.get(key) or "") for key in ("internal_api", "version", "architecture"))
        return {"sgemm": rate, "library": name.strip()}


def _best(work: Callable[[], Any], tries: int) -> float:
    """The shortest time in seconds, after a warm-up run."""
    work()
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def product_shapes(cases: Iterable[Case]) -> list[tuple[int, int, int, int]]:
    """(batch, M, K, N) of the matmuls in the chunked form."""
    found = []
    for case in cases:
        batch, c = case.streams * case.heads, case.chunk
        for i, o in case.spec.shapes:
            found += [(batch, c, i, o), (batch, c, o, i), (batch, c, i, c), (batch, c, c, o), (batch, i, c, o)]
    return sorted(set(found))


def bandwidth(threads: int, sizes: Iterable[int]) -> dict[str, dict[str, float]]:
    """1e9 bytes per second read, and copied (reads and writes both count), by working set in bytes."""
    if not BANDWIDTH.is_file():
        raise MachineError(
            "E0908", "limits", f"the program {BANDWIDTH.name} is missing", "run make bench, which builds it"
        )
    command = [str(BANDWIDTH), str(threads), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values: dict[str, dict[str, float]] = json.loads(done.stdout)
    return values


def measure(cases: list[Case], threads: int) -> dict[str, Any]:
    """All limits, including the working sets of the cases."""
    own = {case.decode_working_set for case in cases if case.kind == "decode"}
    with Worker("benchmarks.limits:TorchLimits", threads, threads=threads) as worker:
        by_torch = worker.call("measure", product_shapes(cases))
    without = {name: os.environ.pop(name) for name in OPENBLAS_OVERRIDES if name in os.environ}
    try:
        with Worker("benchmarks.limits:NumpyLimits", threads, threads=threads) as worker:
            by_numpy = worker.call("measure")
    finally:
        os.environ.update(without)
    return {
        "threads": threads,
        "sgemm_gflops": max(by_torch["sgemm"], by_numpy["sgemm"]),
        "sgemm_gflops_by_library": {"torch": by_torch["sgemm"], by_numpy["library"]: by_numpy["sgemm"]},
        "batched_gflops": by_torch["batched"],
        "bandwidth_gb_s": bandwidth(threads, sorted({*WORKING_SETS, *own})),
    }


def best(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The larger value of each number in two measurements."""
    return {key: best(a[key], b[key]) if isinstance(a[key], dict) else max(a[key], b[key]) for key in a}
