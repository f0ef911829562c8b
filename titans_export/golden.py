"""Golden data: inputs of one stream and its right outputs, kept in the bundle so that `verify` needs no PyTorch.

Outputs of up to ALL_COLUMNS values are kept whole. Of wider ones each position keeps some values, the log-sum-exp and
sketches of all values. docs/bundle.md, Golden inputs and outputs, is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import manifest as records
from .errors import BundleError
from .files import utf8_path
from .safetensors_file import write_safetensors
from .schedule import covering_cuts

if TYPE_CHECKING:
    import torch

    from .model import Graph, StreamModel

GOLDEN = "golden.safetensors"
GOLDEN_GRID = 2.0**-16  # outputs are rounded to this, which hides small differences between machines
ALL_COLUMNS = 512  # widest outputs that are kept whole
HIGHEST, LOWEST, DRAWN = 24, 8, 32  # columns kept of wider ones: largest and smallest values, pseudorandom columns
SKETCHES = 256
SEED = 1
LEAST_POSITIONS = 256
_USUAL_POSITIONS = 1024
_AFTER_BOUNDARY = 64  # positions after the last boundary
_MOST_OUTPUT_BYTES = 3 << 20  # unless LEAST_POSITIONS need more
_MOST_INPUT_BYTES = 2 << 20  # unless the boundaries and graphs need more
_VARIANTS = 4  # ways to sign and divide the columns, by position
_SLAB = 1 << 22  # most values of one step, so that temporary arrays stay small
# A sum of m errors with random signs, each at most t, exceeds sqrt(m) t by this factor with a chance below 3e-14.
_DEVIATIONS = 8.0

Positions = NDArray[np.int64]
Floats = NDArray[Any]
Bits = NDArray[np.uint64]


def _mix(x: Bits) -> Bits:
    """One step of splitmix64 from each state: 64 pseudorandom bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: Bits = x ^ x >> np.uint64(31)
    return mixed


def _bits(seed: int, row: int, count: int) -> Bits:
    """`count` numbers of 64 bits that depend on seed and row alone."""
    first = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(row))
    return _mix(first + np.arange(count).astype(np.uint64))


class _Sketcher:
    """Sums over parts of the columns, with pseudorandom signs.

    If every error of m columns is at most t, their sum errs by at most m t, and by at most 8 sqrt(m) t except with a
    chance of 2 exp(-32). `scale` is the smaller of the two factors. An error of a sum, divided by it, is therefore a
    lower bound of the largest error. An error in one column alone shows in full in one sum of every position.
    """

    def __init__(self, size: int, count: int, seed: int) -> None:
        self._starts = np.arange(count, dtype=np.int64) * size // count
        parts = np.diff(np.append(self._starts, size))
        self.scale = np.minimum(parts, _DEVIATIONS * np.sqrt(parts))
        bits = [_bits(seed, variant, size) for variant in range(_VARIANTS)]
        self._orders = [np.argsort(own, kind="stable") for own in bits]
        self._signs = [
            np.where(own[order] & np.uint64(1), np.float32(-1), np.float32(1))
            for own, order in zip(bits, self._orders, strict=True)
        ]

    def of(self, rows: Floats, positions: Positions) -> NDArray[np.float64]:
        """The sums (n, count) of rows (n, size) of outputs at the positions (n,)."""
        sums = np.empty((len(rows), len(self._starts)))
        for variant in range(_VARIANTS):
            chosen = np.flatnonzero(positions % _VARIANTS == variant)
            step = max(1, _SLAB // rows.shape[1])
            for at in range(0, len(chosen), step):
                own = chosen[at : at + step]
                signed = rows[own][:, self._orders[variant]] * self._signs[variant]
                sums[own] = np.add.reduceat(signed, self._starts, axis=1, dtype=np.float64)
        return sums


def _log_sum_exp(rows: Floats) -> NDArray[np.float64]:
    """Log-sum-exp (n,) of rows (n, size). It moves by no more than the largest change of a value."""
    result = np.empty(len(rows))
    step = max(1, _SLAB // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        highest = part.max(-1)
        result[at : at + step] = highest + np.log(np.exp(part - highest[:, None]).sum(-1, dtype=np.float64))
    return result


@dataclass(frozen=True, eq=False)
class Golden:
    """Golden data of a bundle.

    inputs: (T,) int32 tokens or (T, input size) float32 vectors. positions: (n,) those with golden outputs, ascending.
    values: (n, size) float32, all outputs, or (n, k) those at `columns` (n, k). sketches: (n, m) signed sums of all
    outputs. log_sum_exp: (n,) for logits. size: width of an output. seed: of the sketches' signs and parts.
    """

    inputs: NDArray[Any]
    positions: Positions
    values: NDArray[np.float32]
    size: int
    columns: NDArray[np.int32] | None = None
    sketches: NDArray[np.float32] | None = None
    log_sum_exp: NDArray[np.float32] | None = None
    seed: int = SEED

    # As a reference of `verify`: nothing to compute, and no error of its own is known.
    own_error = None

    def anew(self) -> Golden:
        """This, because all outputs are known."""
        return self

    def advance(self, inputs: NDArray[Any]) -> None:
        """Does nothing: all outputs are known."""

    @property
    def largest(self) -> float:
        """The largest absolute value of an output."""
        return float(np.abs(self.values).max(initial=0.0))

    @cached_property
    def _sketcher(self) -> _Sketcher:
        assert self.sketches is not None
        return _Sketcher(self.size, self.sketches.shape[1], self.seed)

    def amplified(self, start: int, count: int) -> NDArray[np.float64]:
        """Zeros (count,): the manifest has the limits."""
        return np.zeros(count)

    def errors(self, outputs: Floats, start: int) -> NDArray[np.float64]:
        """Largest absolute error (t,) of each row of outputs (t, size), which begin at position `start`.

        Exact for whole outputs. For wider ones a lower bound: the largest of the errors of kept values, log-sum-exp
        and sketches. NaN counts as infinite. Positions without golden outputs have the error 0.
        """
        result = np.zeros(len(outputs))
        first, last = np.searchsorted(self.positions, [start, start + len(outputs)])
        if first < last:
            at = self.positions[first:last] - start
            with np.errstate(all="ignore"):
                result[at] = self._errors(outputs if len(at) == len(outputs) else outputs[at], slice(first, last))
        return result

    def _errors(self, rows: Floats, part: slice) -> NDArray[np.float64]:
        """Errors of the rows at `positions[part]`."""
        kept = rows if self.columns is None else np.take_along_axis(rows, self.columns[part], 1)
        errors = [np.abs(kept.astype(np.float64) - self.values[part]).max(-1, initial=0.0)]
        if self.log_sum_exp is not None:
            errors.append(np.abs(_log_sum_exp(rows) - self.log_sum_exp[part]))
        if self.sketches is not None:
            sums = self._sketcher.of(rows, self.positions[part])
            errors.append((np.abs(sums - self.sketches[part]) / self._sketcher.scale).max(-1, initial=0.0))
        worst: NDArray[np.float64] = np.max(errors, axis=0)
        return np.where(np.isnan(worst), np.inf, worst)


class GoldenBuilder:
    """Makes golden data from consecutive blocks of a stream's outputs.

    inputs: (T,) tokens or (T, input size) vectors. size: width of an output. logits: whether outputs are logits.
    periods: of chunk, segment and schedule, whose boundaries are kept. least: inputs that are kept at any size.
    """

    def __init__(
        self,
        inputs: NDArray[Any],
        size: int,
        *,
        logits: bool = True,
        periods: Iterable[int] = (),
        least: int = LEAST_POSITIONS,
        seed: int = SEED,
    ) -> None:
        vectors = inputs.ndim == 2
        count = len(inputs)
        if vectors:
            count = min(count, max(least, _MOST_INPUT_BYTES // (4 * inputs.shape[1])))
        self._inputs = inputs[:count].astype(np.float32 if vectors else np.int32)
        self._size, self._logits, self._seed = size, logits, seed
        self._whole = size <= ALL_COLUMNS
        row = size if self._whole else 2 * (HIGHEST + LOWEST + DRAWN) + SKETCHES + 2
        self._positions = _chosen(count, max(LEAST_POSITIONS, _MOST_OUTPUT_BYTES // (4 * row)), periods, seed)
        self._sketcher = None if self._whole else _Sketcher(size, SKETCHES, seed)
        self._done = 0
        self._values: list[Floats] = []
        self._columns: list[NDArray[np.int64]] = []
        self._sketches: list[Floats] = []
        self._log_sum_exp: list[Floats] = []

    def add(self, outputs: Floats) -> None:
        """Takes the next outputs (t, size) of float64. Rows without a golden position are dropped."""
        first, last = np.searchsorted(self._positions, [self._done, self._done + len(outputs)])
        positions = self._positions[first:last]
        rows = outputs[positions - self._done]
        self._done += len(outputs)
        if not len(rows):
            return
        if self._sketcher is None:
            self._values.append(_rounded(rows))
            return
        columns = self._columns_of(rows, positions)
        self._columns.append(columns)
        self._values.append(_rounded(np.take_along_axis(rows, columns, 1)))
        self._sketches.append(_rounded(self._sketcher.of(rows, positions)))
        if self._logits:
            self._log_sum_exp.append(_rounded(_log_sum_exp(rows)))

    def _columns_of(self, rows: Floats, positions: Positions) -> NDArray[np.int64]:
        """Ascending columns (n, k): some of the largest and of the smallest values, and pseudorandom ones."""
        split = (LOWEST, self._size - HIGHEST)
        # By the rounded values and a stable order, so that machines that differ in the last bits choose alike.
        order = np.argsort(_rounded(rows), axis=1, kind="stable")
        drawn = [_bits(self._seed, _VARIANTS + int(at), DRAWN) % np.uint64(self._size) for at in positions]
        chosen = [order[:, : split[0]], order[:, split[1] :], np.array(drawn, np.int64)]
        return np.sort(np.concatenate(chosen, 1), axis=1)

    def finish(self) -> Golden:
        """The golden data of all blocks. At least all golden positions must have been added."""
        assert self._done >= len(self._inputs), "outputs are missing"
        return Golden(
            self._inputs,
            self._positions,
            np.concatenate(self._values),
            self._size,
            np.concatenate(self._columns).astype(np.int32) if self._columns else None,
            np.concatenate(self._sketches) if self._sketches else None,
            np.concatenate(self._log_sum_exp) if self._log_sum_exp else None,
            self._seed,
        )


def _rounded(values: Floats) -> NDArray[np.float32]:
    return (np.round(values / GOLDEN_GRID) * GOLDEN_GRID).astype(np.float32)


def _chosen(count: int, most: int, periods: Iterable[int], seed: int) -> Positions:
    """At most `most` of `count` positions: the beginning, the end, boundaries, and pseudorandom ones between."""
    if count <= most:
        return np.arange(count)
    near = {at + step for period in periods for at in range(0, count, max(2, period)) for step in (-1, 0, 1)}
    boundaries = np.array(sorted(at for at in near if 0 <= at < count), np.int64)
    thinned = boundaries[:: max(1, -(-len(boundaries) * 3 // most))]
    fixed = np.unique(np.concatenate([np.arange(most // 4), np.arange(count - most // 8, count), thinned]))
    # One position in each of as many equal parts of the stream.
    parts = np.arange(most - len(fixed) + 1) * count // (most - len(fixed))
    wide = np.diff(parts).astype(np.uint64)
    drawn = parts[:-1] + (_bits(seed, 0, len(wide)) % wide).astype(np.int64)
    return np.unique(np.concatenate([fixed, drawn]))


def periods_of(model: StreamModel, graphs: Sequence[Graph]) -> set[int]:
    """Lengths in tokens after which chunks, segments and the schedule of a model repeat."""
    found = {graph.stride for graph in graphs}
    for facts in model.state_info().values():
        written, rows = facts.written or {}, facts.rows or {}
        found |= {facts.chunk or 1, int(written.get("period", 1)), int(rows.get("segment", 1))}
    return found


def least_positions(model: StreamModel, graphs: Sequence[Graph]) -> int:
    """Positions of a golden stream with two boundaries of each kind, full caches and a run of each graph."""
    info, state = model.state_info(), model.initial_state(1)
    caches = [state[name].shape[2] for name, facts in info.items() if facts.role == "cache" and not facts.written]
    two = 2 * max(periods_of(model, graphs))
    return max(LEAST_POSITIONS, max([two, *caches]) + _AFTER_BOUNDARY, sum(covering_cuts(graphs)))


def usual_positions(model: StreamModel, graphs: Sequence[Graph]) -> int:
    """Positions of the golden stream by default."""
    return max(_USUAL_POSITIONS, least_positions(model, graphs))


def write_golden(folder: Path, golden: Golden, names: tuple[str, str], tolerance: float) -> records.Golden:
    """Writes the golden data into the bundle's folder and returns their entry in the manifest.

    names: of the graphs' input and output, which become the names of inputs and values.
    """
    given, got = names
    tensors: dict[str, Any] = {given: golden.inputs, got: golden.values}
    optional = {
        "columns": golden.columns,
        "sketches": golden.sketches,
        "log_sum_exp": golden.log_sum_exp,
        "positions": golden.positions.astype(np.int32) if len(golden.positions) < len(golden.inputs) else None,
    }
    added = {name: f"golden.{name}" for name, value in optional.items() if value is not None}
    tensors |= {added[name]: value for name, value in optional.items() if value is not None}
    write_safetensors(folder / GOLDEN, tensors)
    positions = added.pop("positions", None)
    entry: dict[str, Any] = {"file": GOLDEN, "tolerance": tolerance}
    entry |= {"vectors": given, "outputs": got} if golden.inputs.ndim == 2 else {"tokens": given, "logits": got}
    entry |= {"sample": {**added, "seed": golden.seed}} if added else {}
    return records.Golden.from_json(entry if positions is None else {**entry, "positions": positions}, "golden")


def read_golden(path: Path, manifest: records.Manifest) -> Golden:
    """The golden data of the bundle at `path`. Raises BundleError if tensors disagree with the manifest."""
    from safetensors.numpy import load_file

    entry = manifest.golden
    with utf8_path(path / entry.file) as opened:
        tensors = load_file(opened)

    def take(name: str | None, dtype: type, *shape: int | None) -> NDArray[Any]:
        value = tensors.get(str(name))
        have = () if value is None or value.dtype != dtype else value.shape
        if (
            value is not None
            and len(have) == len(shape)
            and all(w in (None, h) for w, h in zip(shape, have, strict=True))
        ):
            return value
        expected = f"{np.dtype(dtype)} {['n' if one is None else one for one in shape]}"
        got = "no tensor" if value is None else f"{value.dtype} {list(value.shape)}"
        problem = f"invalid golden tensor {name}: expected {expected}, got {got}"
        raise BundleError("E0207", entry.file, problem, "export the bundle again")

    size, sample = manifest.output.size, entry.sample
    if manifest.input.kind == "vectors":
        inputs = take(entry.vectors, np.float32, None, manifest.input.size)
    else:
        inputs = take(entry.tokens, np.int32, None)
    if entry.positions is None:
        positions = np.arange(len(inputs))
    else:
        positions = take(entry.positions, np.int32, None).astype(np.int64)
    name, count = (entry.outputs if manifest.input.kind == "vectors" else entry.logits), len(positions)
    columns = None if sample is None else take(sample.columns, np.int32, count, None)
    values = take(name, np.float32, count, size if columns is None else columns.shape[1])
    ascending = not count or (positions[0] >= 0 and positions[-1] < len(inputs) and (np.diff(positions) > 0).all())
    if not ascending or (columns is not None and columns.size and not 0 <= columns.min() <= columns.max() < size):
        problem = "golden positions or columns beyond the stream or the output"
        raise BundleError("E0207", entry.file, problem, "export the bundle again")
    if sample is None:
        return Golden(inputs, positions, values, size)
    sketches = take(sample.sketches, np.float32, count, None)
    if not 0 < sketches.shape[1] <= size:
        problem = f"golden sketches: expected 1 to {size} a position, got {sketches.shape[1]}"
        raise BundleError("E0207", entry.file, problem, "export the bundle again")
    log_sum_exp = None if sample.log_sum_exp is None else take(sample.log_sum_exp, np.float32, count)
    return Golden(inputs, positions, values, size, columns, sketches, log_sum_exp, sample.seed)


def _sample_numbers(count: int) -> list[int]:
    """Pseudorandom numbers below 2^31, equal on every machine: the high bits of a linear congruential generator."""
    values, x = [], 1
    for _ in range(count):
        x = x * 6364136223846793005 + 1442695040888963407 & 0xFFFFFFFFFFFFFFFF
        values.append(x >> 33)
    return values


def sample_inputs(model: StreamModel, count: int) -> torch.Tensor:
    """(1, count) token ids, or (1, count, size) vectors of about unit variance, equal on every machine."""
    import torch

    size = model.input.size
    if model.input.kind == "tokens":
        return torch.tensor([[value % size for value in _sample_numbers(count)]])
    values = torch.tensor(_sample_numbers(count * size), dtype=torch.float64).reshape(1, count, size)
    # Uniform in [-sqrt(3), sqrt(3)] has variance 1. Multiples of 2^-16 are exact in float32.
    return (((values / 2**31 * 2 - 1) * 3**0.5 * 2**16).round() / 2**16).float()
