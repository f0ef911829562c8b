"""Who takes part in the layer benchmark: one file each. A new one is a file with a `CONTENDER` and a line here."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from benchmarks.case import Case
from benchmarks.reference import Answer
from titans_export.bench.statistics import Turn
from titans_export.bench.worker import forget_peak, memory_bytes
from titans_export.errors import MachineError

# The first one that a row has is what the others are compared with. Modules are imported by the worker that needs them.
CONTENDERS = (
    "onnxruntime_kernel",
    "kernel",
    "onnxruntime_standard",
    "torch_compile",
    "torch_eager",
    "titans_pytorch",
)


class Contender(ABC):
    """Something that computes a case. It lives in a process of its own, made anew for every row.

    what: a line about it. same_mathematics: whether its answer is the operator's; where it is not, there is nothing to
    compare it with, and its speed says only what a user of it would get.
    """

    what: ClassVar[str]
    same_mathematics: ClassVar[bool] = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self._rss_before = memory_bytes()[0]

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Builds and compiles. Returns what there is to say about how it runs, as text or numbers by name."""

    @abstractmethod
    def answer(self) -> Answer:
        """What `benchmarks.reference.recurrence` has, from one pass with a fresh memory."""

    @abstractmethod
    def run_pass(self) -> list[int]:
        """One pass, the memory learning on from the one before. Nanoseconds of each call."""

    @abstractmethod
    def state_bytes(self) -> int:
        """What it holds for the streams of the case between calls, copies included."""

    def turn(self, passes: int) -> Turn:
        """The times of so many passes, after one that does not count."""
        self.run_pass()
        return [self.run_pass() for _ in range(passes)]

    def about(self) -> tuple[str, bool]:
        """`what` and `same_mathematics`."""
        return self.what, self.same_mathematics

    def start(self) -> None:
        """What is measured begins."""
        forget_peak()

    def memory(self) -> dict[str, int | None]:
        """Bytes of state, and by how much the most memory that was resident since `start` exceeds what was when all
        libraries had been imported and nothing was built; None where that says nothing.
        """
        return {"state_bytes": self.state_bytes(), "rss_growth_bytes": memory_bytes()[1] - self._rss_before}


def display(name: str) -> str:
    """The name as it is said and written."""
    return name.rpartition(".")[2].replace("_", "-")


def unavailable(name: str, expected: str, got: str, remedy: str) -> MachineError:
    """Why a contender cannot take part."""
    return MachineError(name, expected, got, remedy)


def make(name: str, case: Case) -> Contender:
    """The contender of that name, in the worker; a name with dots is that of a module from elsewhere."""
    module = importlib.import_module(name if "." in name else f"benchmarks.contenders.{name}")
    contender: Contender = module.CONTENDER(case)
    return contender
