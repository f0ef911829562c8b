"""Statistics of timed calls: percentiles of a call, tokens per second of a pass, and the range over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A pass is the nanoseconds of each of its calls. In a round, every baseline runs some passes in a row.
Pass = Sequence[int]
Passes = Sequence[Pass]


@dataclass(frozen=True)
class Speed:
    """The speed of one baseline.

    `p50_us` to `p99_us` are percentiles over all calls, in microseconds. The rates are tokens per second:
    `tokens_per_second` is the median over whole passes, which includes work that only some calls do. `slowest_round`
    and `fastest_round` are the range of the medians of rounds. `quartile_1` and `quartile_3` are over all passes.
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


def summarise(rounds: Sequence[Passes], tokens: int) -> Speed:
    """The speed over the rounds, where every pass consumed `tokens` tokens."""
    nanoseconds = [np.array([sum(calls) for calls in passes], dtype=np.float64) for passes in rounds]
    rates = tokens * 1e9 / np.concatenate(nanoseconds)
    medians = [tokens * 1e9 / float(np.median(passes)) for passes in nanoseconds]
    calls: NDArray[np.float64] = np.array(
        [call for passes in rounds for one in passes for call in one], dtype=np.float64
    )
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
        rounds=len(rounds),
        passes=len(rates),
        calls=len(calls),
    )
