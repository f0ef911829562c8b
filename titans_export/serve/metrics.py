"""Metrics of the server in Prometheus' text format, before those of the runtime."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator

_SECONDS = (0.001, 0.004, 0.016, 0.064, 0.256, 1.0, 4.0, 16.0, 64.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A sum that only grows."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._values: dict[Labels, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds to the sum of these labels."""
        with self._lock:
            self._values[tuple(labels.items())] += amount

    def lines(self) -> Iterator[str]:
        """The samples."""
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} counter"
        with self._lock:
            values = dict(self._values) or {(): 0.0}
        for labels, value in values.items():
            yield f"{self.name}{_braces(labels)} {value:g}"


class Histogram:
    """Counts of observations up to each bound."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.name, self.text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Counts one observation."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self) -> Iterator[str]:
        """The samples."""
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} histogram"
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*(f"{bound:g}" for bound in self._bounds), "+Inf"), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {total:g}"
        yield f"{self.name}_count {below}"


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.requests = Counter("titans_serve_requests_total", "Requests by route and status.")
        self.request_seconds = Histogram("titans_serve_request_seconds", "Durations of requests.")
        self.cancelled = Counter("titans_serve_cancelled_total", "Calls ended because their client went away.")
        self.replayed = Counter("titans_serve_replayed_replies_total", "Stored replies sent to repeated requests.")
        self.fenced = Counter("titans_serve_fenced_total", "Writes refused because another server wrote first.")
        self.restored = Counter("titans_serve_restored_streams_total", "Streams read from the store.")
        self.replayed_tokens = Counter("titans_serve_replayed_tokens_total", "Tokens read again from journals.")
        self.restore_seconds = Histogram("titans_serve_restore_seconds", "Time to read a stream from the store.")
        self.journal_seconds = Histogram("titans_serve_journal_seconds", "Time to make a call durable.")
        self.snapshots = Counter("titans_serve_snapshots_total", "Snapshots written.")
        self.batch_streams = Histogram("titans_serve_batch_streams", "Streams in a batch.", _COUNTS)
        self.batch_tokens = Counter("titans_serve_batch_tokens_total", "Tokens read in batches.")
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def observe_batch(self, streams: int, tokens: int) -> None:
        """Counts one batch."""
        self.batch_streams.observe(streams)
        self.batch_tokens.add(tokens)

    def text(self) -> str:
        """Prometheus' text format."""
        lines: list[str] = []
        for one in vars(self).values():
            if isinstance(one, (Counter, Histogram)):
                lines += one.lines()
        for name, (text, read) in self.gauges.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {read():g}"]
        return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    quoted = ",".join(f'{name}="{_escape(value)}"' for name, value in labels)
    return f"{{{quoted}}}" if quoted else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
