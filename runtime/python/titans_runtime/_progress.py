"""Progress of long calls, and signals that arrive during a call."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import TypeAlias, TypeVar

from ._library import ProgressFunction, check, lib

Progress: TypeAlias = Callable[[int, int], object]
T = TypeVar("T")

_SIGNALS = tuple(sorted(signal.valid_signals()))
_PAUSE = 0.02  # seconds between two looks for a signal while a batch runs


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


class Signals:
    """Keeps an exception of a signal handler until the running call has ended.

    Python runs signal handlers on the main thread, between any two steps of Python code. An exception of a handler
    would be lost where C has called Python, and would leave a call that another thread runs. So between `begin` and
    `end` each handler is replaced by one that keeps the first exception in `raised`. `end` raises it.
    """

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self._over = True
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def begin(self) -> bool:
        """Whether there is any handler to replace: only on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = _own_handler(handler, number)
                    signal.signal(number, self._handle)
            if not self._handlers:
                return False
            self._over = False
            return True
        except BaseException as error:  # of a handler
            self.raised = error
            self.end()
            raise

    def end(self) -> None:
        """Sets the handlers back, and raises what one of them has raised."""
        try:
            while not self._restore():
                pass
            self._over = True
        finally:
            if self.raised is not None:
                error, self.raised = self.raised, None
                context = error.__context__
                try:
                    raise error
                finally:
                    error.__context__ = context

    def _restore(self) -> bool:
        """Whether all handlers are set back. One that is back already may raise in between."""
        try:
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._handle:  # not changed by a callback
                    signal.signal(number, handler)
            return True
        except BaseException as error:
            if self.raised is None:
                self.raised = error
            return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        if self._over:
            handler(number, frame)
            return
        try:
            handler(number, frame)
        except BaseException as error:
            if self.raised is None:
                self.raised = error


def _own_handler(handler: Callable[[int, FrameType | None], object], number: int) -> Callable[..., object]:
    """The application's handler, also if an exception has left a replacement of it."""
    owner = getattr(handler, "__self__", None)
    return _own_handler(owner._handlers[number], number) if isinstance(owner, Signals) and owner._over else handler


class Watched:
    """A context for one long call on a stream.

    Calls ``progress(done, total)``; an exception from it, or from a signal handler, ends the call and is raised
    afterwards. On the main thread the call returns to Python after each graph, so that signal handlers can run.
    """

    def __init__(self, stream: ctypes.c_void_p, watcher: Watcher, progress: Progress | None) -> None:
        self._stream = stream
        self._watcher = watcher
        self._progress = progress
        self._signals = Signals()
        self._over = False

    def tell(self, done: int, total: int) -> int:
        if self._over:
            return 0
        try:
            if self._progress is not None and self._signals.raised is None:
                self._progress(done, total)
        except BaseException as error:
            if self._signals.raised is None:
                self._signals.raised = error
        return int(self._signals.raised is not None)

    def __enter__(self) -> None:
        signals = self._signals.begin()
        if not signals and self._progress is None:
            self._over = True
            return
        try:
            self._watcher.watching[threading.get_ident()] = self
            check(lib.titans_stream_set_progress(self._stream, self._watcher.function, None))
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._watcher.watching.pop(threading.get_ident(), None)
            # Refused if another thread uses the stream; its progress goes nowhere.
            lib.titans_stream_set_progress(self._stream, ProgressFunction(), None)
        self._signals.end()


def cancelling(call: Callable[[], T], streams: Sequence[ctypes.c_void_p]) -> T:
    """The result of ``call``, which uses these streams. On the main thread an exception of a signal handler cancels
    their calls, and is raised when these have ended.

    There the call runs in a thread of its own, so that Python can run signal handlers.
    """
    signals = Signals()
    if not signals.begin():
        return call()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    try:
        thread = threading.Thread(target=run, name="titans-batch")
        thread.start()
        while thread.is_alive():
            thread.join(_PAUSE)
            if signals.raised is not None:
                # Repeated, because a stream whose call has not started yet ignores a cancellation.
                for stream in streams:
                    lib.titans_stream_cancel(stream)
        if failure:
            raise failure[0]
        return outcome[0]
    finally:
        signals.end()
