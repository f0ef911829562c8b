"""Runs in a worker: streams of a bundle in titans_runtime.

It imports nothing else of the project, so that the environment of an older commit can run it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import titans_runtime


class BundleStreams:
    """`count` streams of a bundle. options: more arguments of the session."""

    def __init__(self, bundle: str, count: int, options: dict[str, Any]) -> None:
        self._session = titans_runtime.Session(bundle, **options)
        self._count = count
        self._streams: list[Any] = []
        self.reset()

    def prepare(self) -> dict[str, Any]:
        return {"memory_kernel": self._session.info["memory_kernel"]}

    def reset(self) -> None:
        """New streams."""
        for stream in self._streams:
            stream.close()
        self._streams = [self._session.stream() for _ in range(self._count)]

    def outputs(self, tokens: Any) -> Any:
        """The logits after the last token, (count, vocab): a prompt of all tokens but four, then single steps."""
        self.reset()
        for stream in self._streams:
            stream.feed(tokens[:-4], "none")
        for token in tokens[-4:]:
            last = self._step(int(token))
        return last

    def _step(self, token: int) -> Any:
        if self._count == 1:
            return self._streams[0].step(token)[None]
        return self._session.step_batch(self._streams, np.full(self._count, token, np.int32))

    def prefill(self, tokens: Any, passes: int) -> list[list[int]]:
        """Nanoseconds of each pass over the tokens in one feed of the first stream, after one that does not count."""
        taken = []
        for _ in range(1 + passes):
            began = time.perf_counter_ns()
            self._streams[0].feed(tokens, "last")
            taken.append([time.perf_counter_ns() - began])
        return taken[1:]

    def decode(self, tokens: Any, passes: int) -> list[list[int]]:
        """Nanoseconds of each step of all streams, for each pass over the tokens, after one that does not count."""
        timed = []
        for _ in range(1 + passes):
            taken = []
            for token in tokens.tolist():
                began = time.perf_counter_ns()
                self._step(token)
                taken.append(time.perf_counter_ns() - began)
            timed.append(taken)
        return timed[1:]
