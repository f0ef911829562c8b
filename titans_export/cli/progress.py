"""Progress and the time left on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import verbosity
from .command import say

INTERVAL = 10.0  # seconds between lines; a shorter step prints none


@contextmanager
def progress_bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of units done since the last call."""
    if verbosity.quiet():
        yield lambda done: None
        return
    if not sys.stderr.isatty():
        yield _Lines(label, total, unit).advance
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=False, dynamic_ncols=True) as bar:
        yield lambda done: bar.update(done) and None


class _Lines:
    """Plain lines, such as `titans-export: tracing: 1 of 3 graphs (33%), 40 s left`."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._began = self._shown = time.monotonic()

    def advance(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._shown < INTERVAL or (self._total is not None and self._done >= self._total):
            return
        self._shown = now
        say(f"titans-export: {self._label}: {self._text(now - self._began)}", err=True)

    def _text(self, elapsed: float) -> str:
        if self._total is None or not self._done:
            return f"{self._done:,} {self._unit}, {duration(elapsed)} so far"
        share = self._done / self._total
        left = duration(elapsed / share - elapsed)
        return f"{self._done:,} of {self._total:,} {self._unit} ({share:.0%}), {left} left"


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
