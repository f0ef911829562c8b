"""Guards and health: limits on what a memory learns, and whether it diverges."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from ._library import Guard, RawGuardReport, RawHealth, check, invalid, lib

POLICIES = ("off", "raise", "freeze", "skip", "rewind", "decay", "restart")
REASONS = (None, "not finite", "update norm", "surprise", "output", "call", "norm")
STATES = ("healthy", "diverging")


@dataclass(frozen=True)
class GuardReport:
    """Results of a guard since it was set, failed calls included.

    ``rollbacks`` counts chunks with a violation. For the last of them, ``position`` is the position after the chunk,
    ``reason`` is "not finite", "update norm", "surprise", "output", "call" or "norm" (None: no violation), ``layer``
    and ``head`` locate it (-1: no memory), and ``update_norm`` and ``surprise`` are the largest values of all layers
    and heads. ``chunks`` counts the checked chunks. ``peak_update_norm`` and ``peak_surprise`` are the largest values
    without a violation; choose limits above them. If the reason is "norm", the norm of ``field`` was ``value``, above
    its ``limit`` in the bundle. ``repairs`` counts how often the memory was set back. A guard that the bundle or the
    session gives a stream measures updates only if it limits them.
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
    field: str | None = None
    value: float = 0.0
    limit: float = 0.0
    repairs: int = 0


@dataclass(frozen=True)
class Health:
    """Whether a stream's memory diverges.

    ``state`` is "healthy" or "diverging", as of the last of ``checks`` checks. ``divergences`` counts how often the
    memory began to diverge. For the last time, the check at ``position`` found a norm ``value`` above ``limit`` of
    ``field``, such as "layers.0.memory.W0", in the memory ``layer`` and its head ``head`` (None, -1: never).
    """

    state: str
    divergences: int
    position: int
    field: str | None
    layer: int
    head: int
    value: float
    limit: float
    checks: int


def set_guard(
    stream: ctypes.c_void_p,
    policy: str,
    max_update_norm: float,
    max_surprise: float,
    bundle_limits: bool,
    restart_every: int,
) -> None:
    if policy not in POLICIES:
        raise invalid("E0501", "guard", f"unknown policy: {policy!r}", f"choose one of {', '.join(POLICIES)}")
    for name, value in (("max_update_norm", max_update_norm), ("max_surprise", max_surprise)):
        # ctypes would convert values outside float32 to 0 or infinity silently.
        if isinstance(value, bool) or not (value == math.inf or 1e-38 < value < 3e38):
            problem = f"expected {name} above 0 in float32, got {value!r}"
            raise invalid("E0501", "guard", problem, "give math.inf for no limit")
    guard = Guard(
        ctypes.sizeof(Guard), POLICIES.index(policy), max_update_norm, max_surprise, restart_every, bool(bundle_limits)
    )
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
        None if raw.field is None else raw.field.decode(),
        raw.value,
        raw.limit,
        raw.repairs,
    )


def health(stream: ctypes.c_void_p) -> Health:
    raw = RawHealth(ctypes.sizeof(RawHealth))
    check(lib.titans_stream_health(stream, ctypes.byref(raw)))
    return Health(
        STATES[raw.state],
        raw.divergences,
        raw.position,
        None if raw.field is None else raw.field.decode(),
        raw.layer,
        raw.head,
        raw.value,
        raw.limit,
        raw.checks,
    )
