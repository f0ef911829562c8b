"""Progress of long calls, and Ctrl-C."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TypeAlias, TypeVar

from ._library import ProgressFunction, check, lib

Progress: TypeAlias = Callable[[int, int], object]
T = TypeVar("T")


class Watcher:
    """A stream's progress function for the C interface.

    It lives as long as the stream, because a call of another thread may still use it after ours has ended.
    """

    def __init__(self) -> None:
        watching: dict[int, Watched] = {}  # by thread; progress is reported on the thread of the call

        def tell(_user: int | None, done: int, total: int) -> int:
            watched = watching.get(threading.get_ident())
            return watched.tell(done, total) if watched is not None else 0

        self.watching = watching
        self.function = ProgressFunction(tell)


class Watched:
    """A context for one long call on a stream.

    Calls ``progress(done, total)``; an exception from it ends the call and is raised afterwards. Python handles signals
    only on the main thread and only in Python code. There the call returns to Python after each graph, so that the
    Ctrl-C handler can run and end it.
    """

    def __init__(self, stream: ctypes.c_void_p, watcher: Watcher, progress: Progress | None) -> None:
        self._stream = stream
        self._watcher = watcher
        self._progress = progress
        self._raised: BaseException | None = None
        self._handler: Callable[[int, FrameType | None], object] | None = None

    def tell(self, done: int, total: int) -> int:
        try:
            if self._progress is not None and self._raised is None:
                self._progress(done, total)
        except BaseException as error:
            self._raised = error
        return int(self._raised is not None)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Stored, because an exception is lost when C has called Python.
        try:
            if self._handler is not None:
                self._handler(number, frame)
        except BaseException as error:
            self._raised = error

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
        if self._handler is None and self._progress is None:
            return
        check(lib.titans_stream_set_progress(self._stream, self._watcher.function, None))
        self._watcher.watching[threading.get_ident()] = self
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._handler is not None or self._progress is not None:
            self._watcher.watching.pop(threading.get_ident(), None)
            # Refused if another thread uses the stream; its progress goes nowhere.
            lib.titans_stream_set_progress(self._stream, ProgressFunction(), None)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised from None


def cancelling(call: Callable[[], T], streams: Sequence[ctypes.c_void_p]) -> T:
    """The result of ``call``, which uses these streams. Ctrl-C on the main thread cancels their calls.

    On the main thread the call runs in a thread of its own, so that Python can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        try:
            return running.result()
        except BaseException:
            while not running.done():
                for stream in streams:
                    lib.titans_stream_cancel(stream)
                # Repeated, because a stream whose call has not started yet ignores a cancellation.
                with suppress(KeyboardInterrupt):
                    wait([running], timeout=0.01)
            raise
