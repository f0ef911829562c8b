"""Limits on what a stream may do to its memory."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from ._library import INVALID_ARGUMENT, Error, Guard, RawGuardReport, check, lib

POLICIES = ("off", "raise", "freeze", "skip")
REASONS = (None, "not finite", "update norm", "surprise", "output", "call")


@dataclass(frozen=True)
class GuardReport:
    """What a guard has seen since it was set, failed calls included.

    ``rollbacks`` counts the chunks that broke a limit. Of the last of them ``position`` says where the stream stood, or
    would have stood, after it, ``reason`` what was wrong ("not finite", "update norm", "surprise", "output" or "call";
    None: no chunk was), ``layer`` and ``head`` where (-1: in no memory), ``update_norm`` and ``surprise`` the largest
    values of all layers and heads. ``chunks`` were looked at, and ``peak_update_norm`` and ``peak_surprise`` are the
    largest values of those that were good: limits are chosen by them.
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
        raise _wrong(f"policy out of: {', '.join(POLICIES)}", repr(policy), "choose one of these")
    for name, value in (("max_update_norm", max_update_norm), ("max_surprise", max_surprise)):
        # What float32 does not hold would become 0 or infinite without a word.
        if isinstance(value, bool) or not (value == math.inf or 1e-38 < value < 3e38):
            raise _wrong(f"{name} of float32 above 0", repr(value), "give math.inf for no limit")
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


def _wrong(expected: str, got: str, advice: str) -> Error:
    return Error(f"[guard] expected {expected} but got {got}; do {advice}", INVALID_ARGUMENT)
