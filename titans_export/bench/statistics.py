"""What timed calls say: percentiles of a call, tokens a second of a pass, and how much rounds differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A pass is the nanoseconds of each of its calls; a turn is the passes that one contender makes before the next one's.
Pass = Sequence[int]
Turn = Sequence[Pass]


@dataclass(frozen=True)
class Speed:
    """One contender's speed.

    A call's percentiles are over all calls of all turns. `tokens_per_second` is the median over passes, whole ones, so
    that work which only some calls do counts. `slowest_round` to `fastest_round` is the range over rounds of the median
    within a round, `quartile_1` and `quartile_3` hold the middle half of all passes; tokens a second, all four.
    """

    tokens_per_second: float
    slowest_round: float
    fastest_round: float
    quartile_1: float
    quartile_3: float
    p50_us: float
    p90_us: float
    p99_us: float
    rounds: int
    passes: int
    calls: int


def summarise(turns: Sequence[Turn], tokens: int) -> Speed:
    """The speed that the turns show, one turn a round, where every pass consumed `tokens` tokens."""
    rounds = [np.array([sum(calls) for calls in turn], dtype=np.float64) for turn in turns]
    rates = tokens * 1e9 / np.concatenate(rounds)
    medians = [tokens * 1e9 / float(np.median(nanoseconds)) for nanoseconds in rounds]
    calls: NDArray[np.float64] = np.array([call for turn in turns for one in turn for call in one], dtype=np.float64)
    p50, p90, p99 = (float(value) / 1e3 for value in np.percentile(calls, (50, 90, 99)))
    q1, q3 = (float(value) for value in np.percentile(rates, (25, 75)))
    return Speed(
        tokens_per_second=float(np.median(rates)),
        slowest_round=min(medians),
        fastest_round=max(medians),
        quartile_1=q1,
        quartile_3=q3,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        rounds=len(turns),
        passes=len(rates),
        calls=len(calls),
    )
