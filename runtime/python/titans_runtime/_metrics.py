"""Metrics of a session."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

from ._library import RawDurations, RawMetrics, check, lib


@dataclass(frozen=True)
class Durations:
    """Durations of successful calls. Quantiles have a relative error of at most 1/16."""

    count: int
    sum_seconds: float
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Metrics:
    """Counters of a session.

    ``streams``, ``state_bytes`` and ``resident_bytes`` are current values; the rest counts since the session opened.
    ``chunk_updates`` counts completed chunks per memory, ``rollbacks`` chunks that guards rolled back, ``repairs`` how
    often guards set a memory back. ``diverging`` is the number of open streams whose memory diverges, ``divergences``
    how often one began to. ``step`` and ``feed`` are durations of calls with one token and with several.
    """

    streams: int
    tokens: int
    calls: int
    chunk_updates: int
    rollbacks: int
    cancelled: int
    failed: int
    spilled: int
    restored: int
    state_bytes: int
    resident_bytes: int
    step: Durations
    feed: Durations
    diverging: int
    divergences: int
    repairs: int


def read_metrics(session: ctypes.c_void_p) -> Metrics:
    raw = RawMetrics(ctypes.sizeof(RawMetrics))
    check(lib.titans_session_metrics(session, ctypes.byref(raw)))
    numbers = {one.name: getattr(raw, one.name) for one in fields(Metrics)}
    return Metrics(**{**numbers, "step": _durations(raw.step), "feed": _durations(raw.feed)})


def read_metrics_text(session: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    check(lib.titans_session_metrics_text(session, None, 0, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value + 1024)  # counters may grow meanwhile
    check(lib.titans_session_metrics_text(session, text, len(text), ctypes.byref(size)))
    return text.value.decode()


def _durations(raw: RawDurations) -> Durations:
    return Durations(**{one.name: getattr(raw, one.name) for one in fields(Durations)})
