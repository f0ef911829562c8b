"""Baselines of the layer benchmark, one per file. A new baseline needs a file with `BASELINE` and a row here."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from benchmarks.case import Case
from benchmarks.reference import Answer
from titans_export.bench.statistics import Passes
from titans_export.bench.worker import forget_peak, memory_bytes
from titans_export.errors import MachineError

# Ratios are relative to the first baseline of a row. Only a baseline's worker imports its module.
BASELINES = (
    "onnxruntime_kernel",
    "kernel",
    "onnxruntime_standard",
    "torch_compile",
    "torch_eager",
    "titans_pytorch",
)


class Baseline(ABC):
    """An implementation of a case. Every row gets a new process.

    what: a description. same_mathematics: whether it computes the operator. If not, its answer is not compared and its
    speed is only informative.
    """

    what: ClassVar[str]
    same_mathematics: ClassVar[bool] = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self._rss_before = memory_bytes()[0]

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Builds and compiles. Returns notes by name, as text or numbers."""

    @abstractmethod
    def answer(self) -> Answer:
        """The same values as `benchmarks.reference.recurrence`, from one pass with a new memory."""

    @abstractmethod
    def run_pass(self) -> list[int]:
        """Runs one pass that continues from the last pass's memory. Returns the nanoseconds of each call."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes kept between calls for all streams of the case, including copies."""

    def run_passes(self, passes: int) -> Passes:
        """Runs a warm-up pass, then times the passes."""
        self.run_pass()
        return [self.run_pass() for _ in range(passes)]

    def about(self) -> tuple[str, bool]:
        """`what` and `same_mathematics`."""
        return self.what, self.same_mathematics

    def start(self) -> None:
        """Runs before the measurement."""
        forget_peak()

    def memory(self) -> dict[str, int | None]:
        """Bytes of state, and growth of peak resident memory since the imports; None if not meaningful."""
        return {"state_bytes": self.state_bytes(), "rss_growth_bytes": memory_bytes()[1] - self._rss_before}


def display(name: str) -> str:
    """The name in results and on the command line."""
    return name.rpartition(".")[2].replace("_", "-")


def unavailable(name: str, problem: str, fix: str) -> MachineError:
    """The error for a baseline that cannot run on this machine."""
    return MachineError("E0908", name, problem, fix)


def make(name: str, case: Case) -> Baseline:
    """The baseline of that name. A name with dots is a module outside this package."""
    module = importlib.import_module(name if "." in name else f"benchmarks.baselines.{name}")
    baseline: Baseline = module.BASELINE(case)
    return baseline
