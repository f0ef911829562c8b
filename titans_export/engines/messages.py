"""Callbacks of a vendor's builder: log, progress, parser errors, and Ctrl-C.

Callbacks must not raise, because an exception would end the process inside the vendor's frames.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import TitansError

Progress = Callable[[str], None]
# The message on a machine without a driver. Builds ahead of time need no driver.
_NO_DRIVER = "cudaError 35"


class BuildError(TitansError):
    """The vendor's parser or builder rejects a graph."""


def make_log(trt: Any) -> Any:
    """Makes a logger that keeps all messages. The base class comes from the vendor's module."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity.name not in ("VERBOSE", "INFO"):
                self.messages.append((severity.name, text))

        def texts(self, *severities: str) -> list[str]:
            """The messages of these severities."""
            return [text for severity, text in self.messages if severity in severities]

        def first(self) -> str | None:
            """The first failure, or None."""
            errors = self.texts("ERROR", "INTERNAL_ERROR")
            return next((text for text in errors if _NO_DRIVER not in text), None)

        def check(self, where: str) -> None:
            """Raises BuildError if anything has failed so far."""
            if (text := self.first()) is not None:
                raise BuildError(
                    "E0658", where, f"the builder failed: {_sentence(text)}", "change what the message names"
                )

    return Log()


def _sentence(text: str) -> str:
    return text.strip().rstrip(".")


def explain(parser: Any, log: Any) -> str:
    """The parser's first error: operator, node and problem."""
    if not parser.num_errors:
        return _sentence(log.first() or "no reason given")
    error = parser.get_error(0)
    node = error.node_name() or f"number {error.node()}"
    lines = [line for line in error.desc().splitlines() if line.strip() and _NO_DRIVER not in line]
    said = " ".join(lines)
    if said in ("", "false"):
        said = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"{error.node_operator()} node {node!r}: {_sentence(said)}{more}"


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into an event for the block, and into KeyboardInterrupt after it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if event.is_set():
        raise KeyboardInterrupt


def make_monitor(trt: Any, progress: Progress, interrupted: threading.Event) -> Any:
    """Makes a monitor that reports the builder's progress and stops it after an interrupt."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                progress(f"{phase}: {step + 1} of {self.steps.get(phase, step + 1)}")
            except Exception:
                return False  # for example, stderr is closed
            return not interrupted.is_set()

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
