"""Differences of outputs from a reference, position by position and by window. No outputs are kept."""

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
    """The window [start, end). A bundle that takes vectors has errors only; the other fields are None.

    Bits are the mean cost of the window's tokens, each given all tokens before it. `kl_*` is KL(reference || candidate)
    in bits, of the distributions after each token. `top1_agreement` is the fraction of positions with the same top-1
    token.
    """

    start: int
    end: int
    mean_abs_error: float
    max_abs_error: float
    relative_error: float
    reference_bits: float | None = None
    bits: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None

    @property
    def bits_difference(self) -> float | None:
        """Relative increase of the bits over the reference."""
        return None if self.bits is None or self.reference_bits is None else _excess(self.bits, self.reference_bits)


@dataclass(frozen=True)
class MemoryDistance:
    """A layer's memory at a position: distances relative to the reference's norm, and all norms (Frobenius)."""

    position: int
    layer: str
    weights: float
    surprise: float | None
    weights_norm: float
    reference_weights_norm: float
    surprise_norm: float | None
    reference_surprise_norm: float | None


@dataclass
class Drift:
    """The drift of one stream."""

    positions: int = 0
    windows: list[Window] = field(default_factory=list)
    memory: list[MemoryDistance] = field(default_factory=list)
    first_beyond_tolerance: int | None = None
    first_window_beyond: int | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no given tolerance was exceeded."""
        return self.first_bad_position is None

    @property
    def first_bad_position(self) -> int | None:
        """The first position beyond a tolerance; for the bits of a window, its start."""
        found = [at for at in (self.first_beyond_tolerance, self.first_window_beyond) if at is not None]
        return min(found, default=None)

    @property
    def max_abs_error(self) -> float:
        """The maximum over all outputs."""
        return max((window.max_abs_error for window in self.windows), default=0.0)

    @property
    def mean_abs_error(self) -> float:
        """The mean over all outputs."""
        return self._mean("mean_abs_error") or 0.0

    @property
    def bits(self) -> float | None:
        """Bits per token of the whole stream."""
        return self._mean("bits")

    @property
    def reference_bits(self) -> float | None:
        """Bits per token of the reference."""
        return self._mean("reference_bits")

    @property
    def bits_difference(self) -> float | None:
        """Relative increase of the bits over the reference."""
        return None if self.bits is None or self.reference_bits is None else _excess(self.bits, self.reference_bits)

    @property
    def kl_mean(self) -> float | None:
        """Mean KL(reference || candidate) in bits."""
        return self._mean("kl_mean")

    @property
    def kl_max(self) -> float | None:
        """Maximum KL of a position, in bits."""
        found = [window.kl_max for window in self.windows if window.kl_max is not None]
        return max(found, default=None)

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of positions with the same top-1 token."""
        return self._mean("top1_agreement")

    def _mean(self, name: str) -> float | None:
        """The windows' values, weighted by their lengths."""
        values = [(getattr(window, name), window.end - window.start) for window in self.windows]
        if not values or any(value is None for value, _ in values):
            return None
        return math.fsum(value * length for value, length in values) / math.fsum(length for _, length in values)


def _excess(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return value / reference - 1 if reference else math.inf


@dataclass
class _Group:
    """A group of reference outputs with the values that every comparison shares."""

    outputs: Floats
    best: NDArray[np.intp] | None = None
    log_sum: Floats | None = None
    probabilities: Floats | None = None


class ReferenceOutputs:
    """The reference's outputs of a block. Values that all comparisons share are computed once."""

    def __init__(self, outputs: Outputs, logits: bool) -> None:
        self._logits = logits
        self._groups = [(part, _group(outputs[part], logits)) for part in _parts(outputs)]
        self.rows = len(outputs)

    def bits(self, tokens: Tokens, before: Floats) -> tuple[Floats, Floats]:
        """Bits of each token of the block, and of every token after its last row; `before` has those for its first."""
        out, last = np.empty(self.rows), before
        for part, group in self._groups:
            assert group.log_sum is not None
            last = _score(group.outputs, group.log_sum, tokens[part], last, out[part])
        return out, last


@dataclass(frozen=True)
class Columns:
    """One number per position; `kl` and the fields after it for logits only."""

    max_error: Floats
    mean_error: Floats
    squared_error: Floats
    squared_reference: Floats
    kl: Floats | None = None
    agree: Floats | None = None
    reference_bits: Floats | None = None
    bits: Floats | None = None

    def part(self, part: slice) -> Columns:
        """The same for some of the positions."""
        kl, agree, reference_bits, bits = (
            None if value is None else value[part] for value in (self.kl, self.agree, self.reference_bits, self.bits)
        )
        errors = (self.max_error, self.mean_error, self.squared_error, self.squared_reference)
        max_error, mean_error, squared_error, squared_reference = (value[part] for value in errors)
        return Columns(max_error, mean_error, squared_error, squared_reference, kl, agree, reference_bits, bits)


@dataclass
class Meter:
    """Compares one stream with the reference block by block, and sums up by window."""

    logits: bool
    size: int
    window: int
    tolerance: float | None
    bits_tolerance: float | None  # a fraction, not percent
    drift: Drift = field(default_factory=Drift)
    _last: Floats | None = None
    _open: list[Columns] = field(default_factory=list)
    _start: int = 0

    def restart(self) -> None:
        """A fresh stream follows: its first token is uniform."""
        self._last = None

    def add(self, got: Outputs, reference: ReferenceOutputs, tokens: Tokens, reference_bits: Floats | None) -> None:
        """Counts in the outputs of the next positions."""
        columns = self._compare(got, reference, tokens, reference_bits)
        beyond = None if self.tolerance is None else np.flatnonzero(columns.max_error > self.tolerance)
        if beyond is not None and beyond.size and self.drift.first_beyond_tolerance is None:
            self.drift.first_beyond_tolerance = self.drift.positions + int(beyond[0])
        done = 0
        while done < reference.rows:
            count = min(reference.rows - done, self._start + self.window - self.drift.positions)
            self._open.append(columns.part(slice(done, done + count)))
            self.drift.positions += count
            done += count
            if self.drift.positions == self._start + self.window:
                self.close()

    def close(self) -> None:
        """Ends the open window, if any. The last window of a stream may be shorter."""
        if not self._open:
            return
        window = _window(self._start, self.drift.positions, self._open)
        self.drift.windows.append(window)
        self._open, self._start = [], self.drift.positions
        difference = window.bits_difference
        beyond = self.bits_tolerance is not None and difference is not None and not difference <= self.bits_tolerance
        if beyond and self.drift.first_window_beyond is None:
            self.drift.first_window_beyond = window.start

    def _compare(
        self, got: Outputs, reference: ReferenceOutputs, tokens: Tokens, reference_bits: Floats | None
    ) -> Columns:
        count = reference.rows
        max_error, mean_error, squared_error, squared_reference = (np.empty(count) for _ in range(4))
        kl, agree, bits = (np.empty(count) if self.logits else None for _ in range(3))
        last = self._last if self._last is not None else uniform(self.size)
        # NaN counts as an infinite error and needs no warning.
        with np.errstate(invalid="ignore", over="ignore"):
            for part, group in reference._groups:
                other = _group(got[part], self.logits, probabilities=False)
                difference = other.outputs - group.outputs
                squared_error[part] = np.einsum("tn,tn->t", difference, difference)
                squared_reference[part] = np.einsum("tn,tn->t", group.outputs, group.outputs)
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
        return Columns(max_error, mean_error, squared_error, squared_reference, kl, agree, reference_bits, bits)


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
    """Replaces NaN by infinity, in place."""
    values[np.isnan(values)] = np.inf
    return values


def _window(start: int, end: int, parts: list[Columns]) -> Window:
    def joined(name: str) -> Floats:
        values: Floats = np.concatenate([getattr(part, name) for part in parts])
        return values

    squared, reference = float(joined("squared_error").sum()), float(joined("squared_reference").sum())
    squared = math.inf if math.isnan(squared) else squared
    errors = Window(
        start,
        end,
        mean_abs_error=float(joined("mean_error").mean()),
        max_abs_error=float(joined("max_error").max()),
        relative_error=0.0 if not squared else math.sqrt(squared / reference) if reference else math.inf,
    )
    if parts[0].bits is None:
        return errors
    return Window(
        **vars(errors)
        | {
            "reference_bits": float(joined("reference_bits").mean()),
            "bits": float(joined("bits").mean()),
            "kl_mean": float(joined("kl").mean()),
            "kl_max": float(joined("kl").max()),
            "top1_agreement": float(joined("agree").mean()),
        }
    )
