"""The largest errors that outputs may have, by position of the stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .manifest import Limit, Manifest, Stability

Floats = NDArray[np.float64]

# A difference may exceed the largest measured one by this factor. Two implementations round differently, and a chaotic
# model amplifies whichever error is largest.
FLOAT32_FACTOR = 16.0


@dataclass(frozen=True)
class OutputLimits:
    """The limits of a stream's outputs.

    tolerance: the limit within the horizon, or everywhere without `stability`. least: a lower bound of all limits.
    """

    tolerance: float
    stability: Stability | None = None
    least: float = 0.0

    def at(self, start: int, count: int) -> Floats:
        """The limits of `count` positions from `start`, (count,). Infinite if rounding can make any error."""
        if self.stability is None:
            return np.full(count, self.tolerance)
        positions = np.arange(start, start + count)
        each = np.full(count, np.inf)
        for step in self.stability.limits:
            each[positions >= step.start] = np.inf if step.limit is None else step.limit
        each[positions >= self.stability.positions] = np.inf
        limits: Floats = np.maximum(each, self.least)
        return limits


def limits_of(manifest: Manifest, tolerance: float | None = None) -> OutputLimits:
    """The limits of a bundle's outputs. tolerance: the user's, which replaces smaller and larger limits before the
    horizon and is a lower bound beyond it.
    """
    stability, own = manifest.stability, float(manifest.golden.tolerance)
    if stability is None:
        return OutputLimits(own if tolerance is None else tolerance)
    if tolerance is not None:
        beyond = tuple(step for step in stability.limits if step.start > stability.horizon)
        at_horizon = [step for step in stability.limits if step.start <= stability.horizon][-1]
        steps = [Limit(start=0, limit=tolerance)] if stability.horizon else []
        steps += [Limit(start=stability.horizon, limit=at_horizon.limit), *beyond]
        stability = Stability(
            horizon=stability.horizon,
            doubling=stability.doubling,
            positions=stability.positions,
            limits=tuple(steps),
        )
        return OutputLimits(tolerance, stability, tolerance)
    # Quantised weights move outputs from the start. `quantize` measures by how much.
    return OutputLimits(own, stability, own if manifest.quantization else 0.0)


def first_beyond(error: Floats, limits: Floats) -> str | None:
    """The largest error and the first beyond its limit, as a clause; None without one. Both (T,); error ascends."""
    wrong = np.flatnonzero(error > limits)
    if not wrong.size:
        return None
    first = int(wrong[0])
    return f"{error[-1]:.3g}, first beyond its limit at position {first}: {error[first]:.3g}, limit {limits[first]:.3g}"


def describe(stability: Stability) -> str:
    """The stability in one sentence."""
    if stability.horizon == stability.positions:
        return f"exact over all {stability.positions} tokens of the golden stream; {amplifies(stability)}"
    return f"exact over {stability.horizon} tokens; beyond, {amplifies(stability)}"


def amplifies(stability: Stability) -> str:
    """The growth of a difference, as a clause."""
    if stability.doubling is None:
        return "this model amplifies any difference at once"
    return f"this model doubles any difference every {stability.doubling:g} tokens"
