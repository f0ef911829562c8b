"""Guards: limits on chunk updates."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from ._library import Guard, RawGuardReport, check, invalid, lib

POLICIES = ("off", "raise", "freeze", "skip")
REASONS = (None, "not finite", "update norm", "surprise", "output", "call")


@dataclass(frozen=True)
class GuardReport:
    """Results of a guard since it was set, failed calls included.

    ``rollbacks`` counts chunks with a violation. For the last of them, ``position`` is the position after the chunk,
    ``reason`` is "not finite", "update norm", "surprise", "output" or "call" (None: no violation), ``layer`` and
    ``head`` locate it (-1: no memory), and ``update_norm`` and ``surprise`` are the largest values of all layers and
    heads. ``chunks`` counts the checked chunks. ``peak_update_norm`` and ``peak_surprise`` are the largest values
    without a violation; choose limits above them.
    """

    rollbacks: int
    position: int
    reason: str | None
    layer: int
    head: int
    update_norm: float
    surprise: float
    chunks: int
    peak_update_norm: float
    peak_surprise: float


def set_guard(stream: ctypes.c_void_p, policy: str, max_update_norm: float, max_surprise: float) -> None:
    if policy not in POLICIES:
        raise invalid("E0501", "guard", f"unknown policy: {policy!r}", f"choose one of {', '.join(POLICIES)}")
    for name, value in (("max_update_norm", max_update_norm), ("max_surprise", max_surprise)):
        # ctypes would convert values outside float32 to 0 or infinity silently.
        if isinstance(value, bool) or not (value == math.inf or 1e-38 < value < 3e38):
            problem = f"expected {name} above 0 in float32, got {value!r}"
            raise invalid("E0501", "guard", problem, "give math.inf for no limit")
    guard = Guard(ctypes.sizeof(Guard), POLICIES.index(policy), max_update_norm, max_surprise)
    check(lib.titans_stream_set_guard(stream, ctypes.byref(guard)))


def guard_report(stream: ctypes.c_void_p) -> GuardReport:
    raw = RawGuardReport(ctypes.sizeof(RawGuardReport))
    check(lib.titans_stream_guard_report(stream, ctypes.byref(raw)))
    return GuardReport(
        raw.rollbacks,
        raw.position,
        REASONS[raw.reason],
        raw.layer,
        raw.head,
        raw.update_norm,
        raw.surprise,
        raw.chunks,
        raw.peak_update_norm,
        raw.peak_surprise,
    )
