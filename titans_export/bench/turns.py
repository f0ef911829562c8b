"""Taking turns: all contenders measured round by round, so that a noisy neighbour hits each of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from .statistics import Turn

# Threads that wait by spinning fall asleep in this time, and the next contender has the machine for itself.
_SETTLE_S = 0.05


def take_turns(
    contenders: Mapping[str, Callable[[], Turn]],
    rounds: int,
    settle_s: float = _SETTLE_S,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Turn]]:
    """One turn of every contender a round, by name. progress: called with 1 after each turn.

    Each round starts with another contender, so that none always follows the same one.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(settle_s)
            turns[name].append(contenders[name]())
            progress(1)
    return turns
