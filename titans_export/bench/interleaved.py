"""Interleaved measurement: all baselines in every round, so that load by other programs affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from .statistics import Passes

# Spinning threads fall asleep in this time, so that they do not slow down the next baseline.
_SETTLE_S = 0.05


def interleave(
    baselines: Mapping[str, Callable[[], Passes]],
    rounds: int,
    settle_s: float = _SETTLE_S,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Passes]]:
    """The passes of every baseline in every round, by name. Calls `progress` with 1 after each baseline.

    Each round starts with the next baseline, so that none always follows the same one.
    """
    found: dict[str, list[Passes]] = {name: [] for name in baselines}
    names = list(baselines)
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(settle_s)
            found[name].append(baselines[name]())
            progress(1)
    return found
