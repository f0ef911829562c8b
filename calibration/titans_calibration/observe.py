"""Statistics of a matmul's input over data: ranges, channels, a histogram, the Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_calibration.ranges import entropy_limit, mse_limit, percentile_limit

BINS = 8192
WINDOW = 1024  # positions per range of `windows`
_GRAM_ROWS = 512  # rows of a part of a Gram matrix
_ROWS = 1 << 14  # values per pass of a histogram, so that temporaries stay in a cache

Floats = NDArray[Any]


class NotFiniteError(ValueError):
    """NaN or infinity in `row`, the first row with such a value."""

    def __init__(self, value: float, row: int) -> None:
        super().__init__(f"{value} in row {row}")
        self.value, self.row = value, row


class Gram:
    """Sum of x^T x over rows x, (K, K) float32. Only the parts from the diagonal on are kept, about half of it.

    GPTQ adds a hundredth of the mean diagonal, so that rounding in float32 does not matter.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.parts = [
            np.zeros((min(_GRAM_ROWS, channels - begin), channels - begin), np.float32)
            for begin in range(0, channels, _GRAM_ROWS)
        ]

    def add(self, rows: Floats) -> None:
        """Adds rows (n, K)."""
        for begin, part in zip(range(0, self.channels, _GRAM_ROWS), self.parts, strict=True):
            part += rows[:, begin : begin + len(part)].T @ rows[:, begin:]

    def matrix(self) -> NDArray[np.float64]:
        """The whole matrix (K, K) in float64."""
        result = np.empty((self.channels, self.channels))
        for begin, part in zip(range(0, self.channels, _GRAM_ROWS), self.parts, strict=True):
            end = begin + len(part)
            result[begin:end, begin:] = part
            result[end:, begin:end] = part[:, len(part) :].T
        return result

    def __add__(self, other: Gram) -> Gram:
        result = Gram(self.channels)
        result.parts = [a + b for a, b in zip(self.parts, other.parts, strict=True)]
        return result


@dataclass
class Observed:
    """One matmul's input, (rows, K), over all calls.

    count: rows. low, high: over all values. channels: of each channel, the largest absolute value. sum_abs: of each
    channel. gram: sum of x^T x, or None. counts, limit: histogram of absolute values in BINS
    bins up to `limit`, a power of two. window_ranges: low and high by window of WINDOW positions.
    """

    count: int
    low: float
    high: float
    channels: Floats
    sum_abs: Floats
    gram: Gram | None
    counts: NDArray[np.int64]
    limit: float
    window_ranges: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def empty(cls, channels: int, gram: bool = False) -> Observed:
        """No rows yet, for so many channels."""
        return cls(
            count=0,
            low=np.inf,
            high=-np.inf,
            channels=np.zeros(channels, np.float32),
            sum_abs=np.zeros(channels),
            gram=Gram(channels) if gram else None,
            counts=np.zeros(BINS, np.int64),
            limit=0.0,
        )

    @property
    def mean_abs(self) -> Floats:
        """The mean absolute value of each channel, (K,)."""
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
        """Adds values (..., K) of a call at `position`. Raises NotFiniteError."""
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
            self.gram.add(rows)
        self._count_in(magnitudes, max(-low, high))
        window = position // WINDOW
        before = self.window_ranges.get(window, (np.inf, -np.inf))
        self.window_ranges[window] = (min(before[0], low), max(before[1], high))

    def merged(self, other: Observed) -> Observed:
        """The statistics of both, as if all rows had been added to one."""
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


# By the matmul's weight, which has the same name in every graph.
Observations = dict[str, Observed]


def activation_limit(observed: Observed, method: str, percentile: float, levels: int) -> float:
    """The symmetric clipping limit by a method of ACTIVATION_METHODS; `levels` steps lie between zero and it."""
    high = max(-observed.low, observed.high)
    if not observed.count or high <= 0:
        return 1.0  # only zeros: a scale must not be zero
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
    """The histogram up to `before` with bins merged so that it reaches up to `limit`."""
    result = np.zeros_like(counts)
    if not before or before == limit:
        result += counts
    elif limit / before >= BINS:
        result[0] = counts.sum()
    else:
        joined = counts.reshape(-1, int(limit / before)).sum(1)
        result[: len(joined)] = joined
    return result
