"""The calls that run on a session, a stream or a generation, so that none is closed under a call of another thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ._library import invalid

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Owner = TypeVar("Owner", bound="HasCalls")


class Call:
    """One running call. It is over when nothing refers to this object, even if an exception came at a bad moment."""

    __slots__ = ("__weakref__", "process", "thread")

    def __init__(self) -> None:
        self.process = os.getpid()
        self.thread = threading.get_ident()


class Calls:
    """The running calls of one object.

    A call begins before it reads the object's handle, and closing clears the handle before it waits. So either the call
    finds no handle, or closing finds the call.
    """

    __slots__ = ("_running",)

    def __init__(self) -> None:
        self._running: set[weakref.ref[Call]] = set()

    def begin(self) -> Call:
        """A new call. Keep the result in a variable for its time, and clear it in a `finally`."""
        call = Call()
        # Removed by C code, in which no signal handler can raise.
        self._running.add(weakref.ref(call, self._running.discard))
        return call

    def wait(self, where: str) -> None:
        """Waits for all calls. Raises Error if one of them is of this thread, which would wait for itself."""
        while threads := self._threads():
            if threading.get_ident() in threads:
                problem = f"the {where} is in use by a call of this thread"
                raise invalid("E0503", where, problem, "close it after the call, not in its callbacks")
            time.sleep(0.001)

    def _threads(self) -> list[int]:
        """The threads of the running calls. Nothing refers to the calls afterwards.

        In the child of a fork, calls of its parent's threads never end, and do not count.
        """
        calls = [one() for one in list(self._running)]
        return [call.thread for call in calls if call is not None and call.process == os.getpid()]


class HasCalls(Protocol):
    """An object with a handle, and the calls on it."""

    _calls: Calls
    _handle: ctypes.c_void_p


@contextmanager
def closing(owner: HasCalls, where: str) -> Iterator[ctypes.c_void_p]:
    """Takes the handle from an object once no call uses it. The object keeps it if that fails."""
    handle, owner._handle = owner._handle, ctypes.c_void_p()
    try:
        owner._calls.wait(where)
    except BaseException:
        owner._handle = handle
        raise
    yield handle


def in_call(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """A method that is a call on its object for as long as it runs."""

    @wraps(method)
    def run(owner: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        call = owner._calls.begin()
        try:
            return method(owner, *args, **kwargs)
        finally:
            del call

    return run
