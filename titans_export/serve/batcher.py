"""Batches across requests: one thread runs all calls, a block of tokens of each at a time.

A call is a Python generator. It yields the tokens that its stream reads next, and gets their outputs. In each round
every decoding stream reads its token, and a few prompts read a block, the longest waiting first. So a long prompt
delays a decoding stream by one block, not by its whole length.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import titans_runtime as rt

Result = TypeVar("Result")
Outputs = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Read:
    """The tokens or vectors that a stream reads next, and the outputs wanted."""

    tokens: Any
    outputs: Outputs = "last"


class Cancelled(Exception):
    """The call was cancelled between two of its blocks."""


class Job(Generic[Result]):
    """A call in the batcher. `done` gets its result."""

    def __init__(self, stream: rt.Stream, steps: Generator[Read, Any, Result]) -> None:
        self.stream, self.steps = stream, steps
        self.done: Future[Result] = Future()
        self.done.set_running_or_notify_cancel()  # only the batcher ends it
        self.next: Read | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the call before its next block. The stream has read a part of its tokens by then."""
        self.cancelled = True

    def advance(self, value: Any) -> bool:
        """Passes outputs to the call, and gets its next tokens. False if it has ended."""
        try:
            if self.cancelled:
                raise Cancelled
            self.next = self.steps.send(value)
        except StopIteration as end:
            self.done.set_result(end.value)
        except BaseException as error:
            self.fail(error)
        else:
            return True
        return False

    def fail(self, error: BaseException) -> None:
        """Ends the call with an error."""
        self.steps.close()
        self.done.set_exception(error)


class Batcher:
    """The thread, from `start` to `stop`."""

    def __init__(self, session: rt.Session, prompts: int, observe: Callable[[int, int], None] | None = None) -> None:
        """prompts: how many blocks of prompts a round may have. observe: gets streams and tokens of each round."""
        self._session, self._prompts = session, prompts
        self._observe = observe or (lambda streams, tokens: None)
        self._new: deque[Job[Any]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="titans-batcher", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the calls that it has."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, job: Job[Any]) -> None:
        """Adds a call."""
        with self._wake:
            if self._stopping:
                raise RuntimeError("the batcher has stopped")
            self._new.append(job)
            self._wake.notify()

    def _run(self) -> None:
        jobs: deque[Job[Any]] = deque()
        while True:
            with self._wake:
                while not self._new and not jobs and not self._stopping:
                    self._wake.wait()
                if self._stopping and not self._new and not jobs:
                    return
                new, self._new = self._new, deque()
            jobs.extend(job for job in new if job.advance(None))
            jobs = self._round(jobs)

    def _round(self, jobs: deque[Job[Any]]) -> deque[Job[Any]]:
        """Runs one block of the calls whose turn it is. Returns the rest, those that waited first."""
        chosen: list[Job[Any]] = []
        waiting: deque[Job[Any]] = deque()
        prompts = 0
        for job in jobs:
            assert job.next is not None
            long = len(job.next.tokens) > 1
            if job.cancelled:
                job.fail(Cancelled())
            elif long and prompts == self._prompts:
                waiting.append(job)
            else:
                prompts += long
                chosen.append(job)
        for outputs in ("last", "all", "none"):
            group = [job for job in chosen if job.next is not None and job.next.outputs == outputs]
            if group:
                self._feed(group, outputs)
        waiting.extend(job for job in chosen if not job.done.done())
        return waiting

    def _feed(self, jobs: Sequence[Job[Any]], outputs: Outputs) -> None:
        reads = [job.next.tokens for job in jobs if job.next is not None]
        statuses = [0] * len(jobs)
        results: Any
        try:
            results = self._session.feed_batch([job.stream for job in jobs], reads, outputs)
        except rt.BatchError as error:
            results, statuses = error.outputs, error.statuses
        except Exception as error:
            for job in jobs:
                job.fail(error)
            return
        self._observe(len(jobs), sum(map(len, reads)))
        for index, job in enumerate(jobs):
            if statuses[index]:
                job.fail(_own_error(job, reads[index]))
            else:
                job.advance(None if results is None else results[index])


def _own_error(job: Job[Any], tokens: Any) -> BaseException:
    """The error of one stream: a batch reports the first one only. The stream is unchanged, so it fails again."""
    try:
        job.stream.feed(tokens, outputs="none")
    except rt.Error as error:
        return error
    return Cancelled()
