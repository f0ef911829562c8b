"""What a matmul's input did over data: ranges, channels, a histogram, the Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_calibration.ranges import entropy_limit, mse_limit, percentile_limit

BINS = 8192
WINDOW = 1024  # positions over which `windows` gives one range
_ROWS = 1 << 14  # of a histogram's pass, so that its temporaries stay in a cache

Floats = NDArray[Any]


class NotFiniteError(ValueError):
    """NaN or infinity among the values; `row` is the first that holds one."""

    def __init__(self, value: float, row: int) -> None:
        super().__init__(f"{value} in row {row}")
        self.value, self.row = value, row


@dataclass
class Observed:
    """One matmul's input, K channels wide, over all rows that were added.

    count: rows. low, high: over all values. channels: of each channel, the largest absolute value. sum_abs: of each
    channel. gram: sum of x^T x over the rows, float64, or None where nobody asked. counts, limit: histogram of absolute
    values in BINS bins up to `limit`, a power of two. window_ranges: low and high by window of WINDOW positions.
    """

    count: int
    low: float
    high: float
    channels: Floats
    sum_abs: Floats
    gram: Floats | None
    counts: NDArray[np.int64]
    limit: float
    window_ranges: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def empty(cls, channels: int, gram: bool = False) -> Observed:
        """Nothing seen yet of so many channels."""
        return cls(
            count=0,
            low=np.inf,
            high=-np.inf,
            channels=np.zeros(channels, np.float32),
            sum_abs=np.zeros(channels),
            gram=np.zeros((channels, channels)) if gram else None,
            counts=np.zeros(BINS, np.int64),
            limit=0.0,
        )

    @property
    def mean_abs(self) -> Floats:
        """Of each channel, the mean absolute value, (K,)."""
        return self.sum_abs / max(self.count, 1)

    @property
    def histogram(self) -> tuple[NDArray[np.int64], float]:
        """Counts of absolute values, and the upper end of the last bin."""
        return self.counts, self.limit

    @property
    def windows(self) -> list[tuple[int, float, float]]:
        """First position, low and high of each window, in order."""
        return [(window * WINDOW, *self.window_ranges[window]) for window in sorted(self.window_ranges)]

    def add(self, values: Floats, position: int) -> None:
        """Counts in values (..., K) that a call from this position on gave. Raises NotFiniteError."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return
        low, high = float(rows.min()), float(rows.max())
        if not np.isfinite(low) or not np.isfinite(high):
            row, channel = np.argwhere(~np.isfinite(rows))[0]
            raise NotFiniteError(float(rows[row, channel]), int(row))
        magnitudes = np.abs(rows)
        self.count += len(rows)
        self.low, self.high = min(self.low, low), max(self.high, high)
        np.maximum(self.channels, magnitudes.max(0), out=self.channels)
        self.sum_abs += magnitudes.sum(0, dtype=np.float64)
        if self.gram is not None:
            self.gram += rows.T @ rows
        self._count_in(magnitudes, max(-low, high))
        window = position // WINDOW
        before = self.window_ranges.get(window, (np.inf, -np.inf))
        self.window_ranges[window] = (min(before[0], low), max(before[1], high))

    def merged(self, other: Observed) -> Observed:
        """Both together, as if one had seen all."""
        if self.channels.shape != other.channels.shape or (self.gram is None) != (other.gram is None):
            raise ValueError("observations of different matmuls")
        limit = max(self.limit, other.limit)
        ranges = dict(self.window_ranges)
        for window, (low, high) in other.window_ranges.items():
            before = ranges.get(window, (np.inf, -np.inf))
            ranges[window] = (min(before[0], low), max(before[1], high))
        return Observed(
            count=self.count + other.count,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            channels=np.maximum(self.channels, other.channels),
            sum_abs=self.sum_abs + other.sum_abs,
            gram=None if self.gram is None or other.gram is None else self.gram + other.gram,
            counts=_widened(self.counts, self.limit, limit) + _widened(other.counts, other.limit, limit),
            limit=limit,
            window_ranges=ranges,
        )

    def _count_in(self, magnitudes: Floats, largest: float) -> None:
        limit = self.limit or _power_above(largest)
        if largest > limit:
            limit = _power_above(largest)
        self.counts, self.limit = _widened(self.counts, self.limit, limit), limit
        if not limit:
            self.counts[0] += magnitudes.size
            return
        flat = magnitudes.reshape(-1)
        for start in range(0, flat.size, _ROWS):
            # The factor is a power of two, so scaling is exact and bins do not depend on rounding.
            bins = (flat[start : start + _ROWS].astype(np.float64) * (BINS / limit)).astype(np.int64)
            self.counts += np.bincount(np.minimum(bins, BINS - 1, out=bins), minlength=BINS)


# By the name of a matmul's weight initialiser, which is the same in every graph.
Observations = dict[str, Observed]


def activation_limit(observed: Observed, method: str, percentile: float, levels: int) -> float:
    """The symmetric clipping limit by a method of ACTIVATION_METHODS, for `levels` steps from zero to it."""
    high = max(-observed.low, observed.high)
    if not observed.count or high <= 0:
        return 1.0  # nothing but zeros: any limit is right, and a scale must not be zero
    if method == "percentile":
        found = percentile_limit(observed.counts, observed.limit, percentile)
    elif method == "mse":
        found = mse_limit(observed.counts, observed.limit, high, levels)
    elif method == "entropy":
        found = entropy_limit(observed.counts, observed.limit, levels)
    else:
        found = high
    return min(found, high) if found > 0 else high


def _power_above(value: float) -> float:
    """The least power of two that is at least `value`, 0 for 0."""
    return float(2.0 ** np.ceil(np.log2(value))) if value > 0 else 0.0


def _widened(counts: NDArray[np.int64], before: float, limit: float) -> NDArray[np.int64]:
    """The histogram up to `before`, its bins added together so that they reach up to `limit`."""
    result = np.zeros_like(counts)
    if not before or before == limit:
        result += counts
    elif limit / before >= BINS:
        result[0] = counts.sum()
    else:
        joined = counts.reshape(-1, int(limit / before)).sum(1)
        result[: len(joined)] = joined
    return result
