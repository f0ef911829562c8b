"""A baseline in its own process, with its own threads, memory and crashes.

The process holds one object and calls one method at a time, for a result or an error. Output of libraries on stdout
does not mix with the results.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import TitansError

# Environment variables from which libraries take their number of threads at import.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LONGEST_REASON = 300


class WorkerError(Exception):
    """An error in the worker, in one line."""


class Worker:
    """An object made by `target`, "module:callable", in a process with `threads` threads.

    environment: another Python, with titans-export installed, and the folder of the target's module; None: this Python
    and its search path.
    """

    def __init__(self, target: str, *args: Any, threads: int, environment: tuple[Path, Path] | None = None) -> None:
        ours, theirs = Pipe()
        python, search = environment or (sys.executable, os.pathsep.join(path for path in sys.path if path))
        variables = {**os.environ, **dict.fromkeys(_THREADS, str(threads)), "PYTHONPATH": str(search)}
        # Python reports a failed start on stderr only.
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        with theirs:
            self._process = subprocess.Popen(
                [str(python), "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._noise,
                stderr=self._noise,
                env=variables,
                cwd=None if environment is None else environment[1],
                pass_fds=[theirs.fileno()],
            )
        self._connection = ours
        try:
            self._exchange((target, args))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """The method's result. Raises WorkerError."""
        return self._exchange((method, args))

    def close(self) -> None:
        """Ends the process. Closing twice does nothing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._noise.close()

    def _exchange(self, message: tuple[str, tuple[Any, ...]]) -> Any:
        try:
            self._connection.send(message)
            good, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(f"it ended with {self._process.wait()}: {self._last_words()}") from None
        if good:
            return value
        raise WorkerError(value)

    def _last_words(self) -> str:
        self._noise.seek(0)
        lines = self._noise.read().decode("utf-8", "replace").strip().splitlines() or ["nothing on stderr"]
        return lines[-1][:_LONGEST_REASON]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def memory_bytes() -> tuple[int, int]:
    """Resident bytes now, and their peak since the start or `forget_peak`, from /proc."""
    with open("/proc/self/status") as status:
        entries = dict(line.split(":", 1) for line in status)
    now, peak = (int(entries[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    """Resets the peak of resident memory, if the system allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def explain(error: BaseException) -> str:
    """An error in one line; with its type unless it is one of ours."""
    ours = isinstance(error, TitansError) or type(error).__module__.startswith("titans_runtime")
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    return text if ours else f"{type(error).__name__}: {text}"


def _serve(connection: Connection[Any, Any]) -> None:
    """Serves calls until the connection closes."""
    subject: Any = None
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            if subject is None:
                module, _, maker = name.partition(":")
                subject = getattr(importlib.import_module(module), maker)(*args)
                value = None
            else:
                value = getattr(subject, name)(*args)
        except Exception as error:
            traceback.print_exc()
            connection.send((False, explain(error)))
        else:
            connection.send((True, value))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve(Connection(int(sys.argv[1])))
