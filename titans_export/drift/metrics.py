"""How far outputs are from the right ones, position by position and summed up by window. No outputs are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Outputs = NDArray[np.float32]  # (T, size)
Tokens = NDArray[np.int32]

# Rows are compared in groups of so many elements, which stay in a core's cache from one step to the next.
_GROUP_ELEMENTS = 1 << 15
_LN2 = math.log(2)


@dataclass(frozen=True)
class Window:
    """What happened in [start, end). Of a bundle that takes vectors only the errors are numbers.

    Bits are those of the tokens in the window, each given all before it; `kl_*` is KL(right || other) in bits, of the
    distributions after each token; `agreement` is how often both find the same token likeliest.
    """

    start: int
    end: int
    mean_abs_error: float
    max_abs_error: float
    relative_error: float
    base_bits: float | None = None
    bits: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    agreement: float | None = None

    @property
    def bits_difference(self) -> float | None:
        """By which part of the right bits the other's are larger."""
        return None if self.bits is None or self.base_bits is None else _excess(self.bits, self.base_bits)


@dataclass(frozen=True)
class MemoryDistance:
    """A layer's memory at a position: distances relative to the norm of the right one, and all norms (Frobenius)."""

    position: int
    layer: str
    weights: float
    surprise: float | None
    weights_norm: float
    base_weights_norm: float
    surprise_norm: float | None
    base_surprise_norm: float | None


@dataclass
class Drift:
    """What the comparison found about one stream."""

    positions: int = 0
    windows: list[Window] = field(default_factory=list)
    memory: list[MemoryDistance] = field(default_factory=list)
    first_beyond_tolerance: int | None = None
    first_window_beyond: int | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all tolerances that were given held."""
        return self.first_bad_position is None

    @property
    def first_bad_position(self) -> int | None:
        """The first position where a tolerance did not hold; of a window's bits, where the window starts."""
        found = [at for at in (self.first_beyond_tolerance, self.first_window_beyond) if at is not None]
        return min(found, default=None)

    @property
    def max_abs_error(self) -> float:
        """The largest of any output."""
        return max((window.max_abs_error for window in self.windows), default=0.0)

    @property
    def mean_abs_error(self) -> float:
        """Over all outputs."""
        return self._mean("mean_abs_error") or 0.0

    @property
    def bits(self) -> float | None:
        """Bits a token, of the whole stream."""
        return self._mean("bits")

    @property
    def base_bits(self) -> float | None:
        """The same, of the stream that is right."""
        return self._mean("base_bits")

    @property
    def bits_difference(self) -> float | None:
        """By which part of the right bits the stream's are larger."""
        return None if self.bits is None or self.base_bits is None else _excess(self.bits, self.base_bits)

    @property
    def kl_mean(self) -> float | None:
        """KL(right || other) in bits, over all positions."""
        return self._mean("kl_mean")

    @property
    def kl_max(self) -> float | None:
        """The largest of a position."""
        found = [window.kl_max for window in self.windows if window.kl_max is not None]
        return max(found, default=None)

    @property
    def agreement(self) -> float | None:
        """How often both find the same token likeliest."""
        return self._mean("agreement")

    def _mean(self, name: str) -> float | None:
        """The windows' values, weighted by their lengths."""
        values = [(getattr(window, name), window.end - window.start) for window in self.windows]
        if not values or any(value is None for value, _ in values):
            return None
        return math.fsum(value * length for value, length in values) / math.fsum(length for _, length in values)


def _excess(value: float, right: float) -> float:
    if value == right:
        return 0.0
    return value / right - 1 if right else math.inf


@dataclass
class _Group:
    """A group of right outputs with what every comparison with them needs."""

    outputs: Floats
    best: NDArray[np.intp] | None = None
    log_sum: Floats | None = None
    probabilities: Floats | None = None


class Right:
    """The outputs of a block that are right. What comparisons share is computed once."""

    def __init__(self, outputs: Outputs, logits: bool) -> None:
        self._logits = logits
        self._groups = [(part, _group(outputs[part], logits)) for part in _parts(outputs)]
        self.rows = len(outputs)

    def bits(self, tokens: Tokens, before: Floats) -> tuple[Floats, Floats]:
        """Bits of each token of the block, and those of every token after its last row; `before` precede its first."""
        out, last = np.empty(self.rows), before
        for part, group in self._groups:
            assert group.log_sum is not None
            last = _score(group.outputs, group.log_sum, tokens[part], last, out[part])
        return out, last


@dataclass(frozen=True)
class Columns:
    """A number for each position; `bits` and the others after it only of logits."""

    max_error: Floats
    mean_error: Floats
    squared_error: Floats
    squared_right: Floats
    kl: Floats | None = None
    agree: Floats | None = None
    base_bits: Floats | None = None
    bits: Floats | None = None

    def part(self, part: slice) -> Columns:
        """The same for some of the positions."""
        kl, agree, base_bits, bits = (
            None if value is None else value[part] for value in (self.kl, self.agree, self.base_bits, self.bits)
        )
        errors = (self.max_error, self.mean_error, self.squared_error, self.squared_right)
        max_error, mean_error, squared_error, squared_right = (value[part] for value in errors)
        return Columns(max_error, mean_error, squared_error, squared_right, kl, agree, base_bits, bits)


@dataclass
class Meter:
    """Compares one stream with the right one, block after block, and sums up by window."""

    logits: bool
    size: int
    window: int
    tolerance: float | None
    bits_tolerance: float | None  # a part, not percent
    drift: Drift = field(default_factory=Drift)
    _last: Floats | None = None
    _open: list[Columns] = field(default_factory=list)
    _start: int = 0

    def restart(self) -> None:
        """A fresh stream follows: its first token is uniform."""
        self._last = None

    def add(self, got: Outputs, right: Right, tokens: Tokens, base_bits: Floats | None) -> None:
        """Counts in the outputs of the next positions."""
        columns = self._compare(got, right, tokens, base_bits)
        beyond = None if self.tolerance is None else np.flatnonzero(columns.max_error > self.tolerance)
        if beyond is not None and beyond.size and self.drift.first_beyond_tolerance is None:
            self.drift.first_beyond_tolerance = self.drift.positions + int(beyond[0])
        done = 0
        while done < right.rows:
            count = min(right.rows - done, self._start + self.window - self.drift.positions)
            self._open.append(columns.part(slice(done, done + count)))
            self.drift.positions += count
            done += count
            if self.drift.positions == self._start + self.window:
                self.close()

    def close(self) -> None:
        """Ends the window that is open, if there is one: at the end of a stream it may be shorter."""
        if not self._open:
            return
        window = _window(self._start, self.drift.positions, self._open)
        self.drift.windows.append(window)
        self._open, self._start = [], self.drift.positions
        difference = window.bits_difference
        beyond = self.bits_tolerance is not None and difference is not None and not difference <= self.bits_tolerance
        if beyond and self.drift.first_window_beyond is None:
            self.drift.first_window_beyond = window.start

    def _compare(self, got: Outputs, right: Right, tokens: Tokens, base_bits: Floats | None) -> Columns:
        count = right.rows
        max_error, mean_error, squared_error, squared_right = (np.empty(count) for _ in range(4))
        kl, agree, bits = (np.empty(count) if self.logits else None for _ in range(3))
        last = self._last if self._last is not None else uniform(self.size)
        # What is not finite is told as infinitely far, not warned of.
        with np.errstate(invalid="ignore", over="ignore"):
            for part, group in right._groups:
                other = _group(got[part], self.logits, probabilities=False)
                difference = other.outputs - group.outputs
                squared_error[part] = np.einsum("tn,tn->t", difference, difference)
                squared_right[part] = np.einsum("tn,tn->t", group.outputs, group.outputs)
                if kl is not None and agree is not None and bits is not None:
                    assert group.probabilities is not None and group.log_sum is not None and other.log_sum is not None
                    expected = np.einsum("tn,tn->t", group.probabilities, difference)
                    kl[part] = _finite(np.maximum(other.log_sum - group.log_sum - expected, 0)) / _LN2
                    agree[part] = other.best == group.best
                    last = _score(other.outputs, other.log_sum, tokens[part], last, bits[part])
                np.abs(difference, out=difference)
                max_error[part] = _finite(difference.max(-1))
                mean_error[part] = _finite(difference.mean(-1))
        self._last = last if self.logits else None
        return Columns(max_error, mean_error, squared_error, squared_right, kl, agree, base_bits, bits)


def uniform(size: int) -> Floats:
    """Bits of every token before anything was consumed."""
    return np.full(size, math.log2(size))


def _parts(outputs: Outputs) -> Iterator[slice]:
    rows = max(1, _GROUP_ELEMENTS // max(1, outputs.shape[1]))
    for start in range(0, len(outputs), rows):
        yield slice(start, min(start + rows, len(outputs)))


def _group(outputs: Outputs, logits: bool, probabilities: bool = True) -> _Group:
    values = outputs.astype(np.float64)
    if not logits:
        return _Group(values)
    best = outputs.argmax(-1)
    largest = values[np.arange(len(values)), best]
    with np.errstate(invalid="ignore", over="ignore"):
        exponentials = np.exp(values - largest[:, None])
        total = exponentials.sum(-1)
        log_sum = largest + np.log(total)
        if probabilities:
            exponentials /= total[:, None]
    return _Group(values, best, log_sum, exponentials if probabilities else None)


def _score(outputs: Floats, log_sum: Floats, tokens: Tokens, before: Floats, out: Floats) -> Floats:
    """Writes the bits of each token, given the row before it, into `out`; bits of every token after the last row."""
    with np.errstate(invalid="ignore", over="ignore"):
        out[0] = before[tokens[0]]
        rows = np.arange(len(tokens) - 1)
        out[1:] = (log_sum[:-1] - outputs[rows, tokens[1:]]) / _LN2
        out[:] = _finite(out)
        following: Floats = (log_sum[-1] - outputs[-1]) / _LN2
    return following


def _finite(values: Floats) -> Floats:
    """NaN is infinitely far."""
    values[np.isnan(values)] = np.inf
    return values


def _window(start: int, end: int, parts: list[Columns]) -> Window:
    def joined(name: str) -> Floats:
        values: Floats = np.concatenate([getattr(part, name) for part in parts])
        return values

    squared, right = float(joined("squared_error").sum()), float(joined("squared_right").sum())
    squared = math.inf if math.isnan(squared) else squared
    errors = Window(
        start,
        end,
        mean_abs_error=float(joined("mean_error").mean()),
        max_abs_error=float(joined("max_error").max()),
        relative_error=0.0 if not squared else math.sqrt(squared / right) if right else math.inf,
    )
    if parts[0].bits is None:
        return errors
    return Window(
        **vars(errors)
        | {
            "base_bits": float(joined("base_bits").mean()),
            "bits": float(joined("bits").mean()),
            "kl_mean": float(joined("kl").mean()),
            "kl_max": float(joined("kl").max()),
            "agreement": float(joined("agree").mean()),
        }
    )
