"""Compares a bundle in the runtime with reference outputs, for any cuts of the stream into calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .output_limits import FLOAT32_FACTOR, OutputLimits
from .schedule import calls, may_start

if TYPE_CHECKING:
    import torch

    import titans_runtime

    from .model import StreamModel

Tokens = npt.NDArray[Any]  # (T,) int32, or (T, size) float32 for a bundle that takes vectors
Outputs = npt.NDArray[Any]  # (T, size)
Errors = npt.NDArray[np.float64]  # (T,)

# Maximum size of the outputs that are held at a time, unless one call has more.
_PIECE_BYTES = 32 << 20


class Reference(Protocol):
    """The reference outputs: golden data, or the model in PyTorch."""

    def advance(self, inputs: Tokens) -> None:
        """Computes the outputs of the next block of the stream, if they are not known."""

    def errors(self, outputs: Outputs, start: int) -> Errors:
        """Largest absolute error (T,) of each row of outputs (T, size) of the block, from position `start` on.

        Infinite for NaN, 0 for a position without reference.
        """

    def amplified(self, start: int, count: int) -> Errors:
        """What rounding in float32 makes up for, as far as the reference measures it, (count,), from `start` on."""

    @property
    def own_error(self) -> float | None:
        """Largest error of these outputs so far, None if unknown."""

    def anew(self) -> Reference:
        """The same reference at the first token."""


class PyTorch:
    """The model in PyTorch, in float32 and in float64."""

    def __init__(self, model: StreamModel) -> None:
        from .model.float64 import Float64

        self._model = model.float()
        self._contexts = (nullcontext, Float64)
        self._states = []
        for context in self._contexts:
            with context():
                self._states.append(model.initial_state(1))
        self._start = self._position = 0
        self._right: Outputs = np.empty((0, 0))
        self._own: Errors = np.empty(0)
        self._error = 0.0

    @property
    def own_error(self) -> float:
        """Largest difference between float32 and float64 so far."""
        return self._error

    def anew(self) -> PyTorch:
        """The model at the first token."""
        return PyTorch(self._model)

    def advance(self, inputs: Tokens) -> None:
        """Advances both models by the block."""
        import torch

        vectors = inputs.dtype.kind == "f"
        batch = torch.from_numpy(inputs if vectors else inputs.astype(np.int64))[None]
        outputs: list[torch.Tensor] = []
        for i, context in enumerate(self._contexts):
            with context():
                out, self._states[i] = self._model.feed(batch, self._states[i], self._position)
            outputs.append(out[0])
        self._start, self._position = self._position, self._position + len(inputs)
        self._right = outputs[0].numpy()
        own = row_errors(self._right, outputs[1].numpy())
        self._own = np.maximum(np.maximum.accumulate(own), self._error)
        self._error = float(self._own[-1]) if len(own) else self._error

    def errors(self, outputs: Outputs, start: int) -> Errors:
        """Errors of the outputs against float32."""
        at = start - self._start
        return row_errors(outputs, self._right[at : at + len(outputs)])

    def amplified(self, start: int, count: int) -> Errors:
        """The difference of float32 from float64 so far, with a factor for another implementation."""
        at = start - self._start
        return FLOAT32_FACTOR * self._own[at : at + count]


def row_errors(outputs: Outputs, right: Outputs) -> Errors:
    """Largest absolute error (T,) of each row of outputs (T, size), infinite for NaN."""
    error = np.abs(outputs.astype(np.float64) - right).max(-1, initial=0.0)
    return np.where(np.isnan(error), np.inf, error)


@dataclass
class Distance:
    """Largest difference of a stream's outputs from the reference."""

    max_abs_error: float = 0.0
    first_bad_position: int | None = None

    def add(self, errors: Errors, position: int, limits: float | Errors) -> None:
        """Adds the errors (T,) of outputs from `position` on, with their limit or the limit of each."""
        self.max_abs_error = max(self.max_abs_error, float(errors.max(initial=0.0)))
        bad = np.flatnonzero(errors > limits)
        if self.first_bad_position is None and bad.size:
            self.first_bad_position = position + int(bad[0])


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_stream`.

    graphs: calls of each graph, 0 for a graph that the stream is too short for. feeds: the distance for each way of
    feeding the stream.
    """

    positions: int
    tolerance: float
    pytorch_float32_to_float64: float | None
    graphs: dict[str, int]
    feeds: dict[str, Distance] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every output was within the tolerance."""
        return self.first_bad_position is None

    @property
    def unused_graphs(self) -> list[str]:
        """Graphs that did not run, about which the report states nothing."""
        return [name for name, count in self.graphs.items() if not count]

    @property
    def max_abs_error(self) -> float:
        """The maximum over all ways of feeding."""
        return max(distance.max_abs_error for distance in self.feeds.values())

    @property
    def first_bad_position(self) -> int | None:
        """The first over all ways of feeding."""
        found = (distance.first_bad_position for distance in self.feeds.values())
        return min((position for position in found if position is not None), default=None)


def verify_stream(
    session: titans_runtime.Session,
    tokens: Tokens,
    reference: Reference,
    tolerance: float | OutputLimits,
    cuts_seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> VerifyReport:
    """Compares all outputs of three streams: fed whole, token by token and in random cuts.

    tokens: (T,) int32, or (T, size) float32 for a bundle that takes vectors. The random cuts make every graph run that
    the stream is long enough for. tolerance: of all outputs, or limits by position.
    """
    reports = verify_blocks(session, tokens, reference, tolerance, cuts_seed)
    *_, report = (_reported(report, progress) for report in reports)
    return report


def _reported(report: VerifyReport, progress: Callable[[int], None]) -> VerifyReport:
    progress(report.positions)
    return report


def verify_blocks(
    session: titans_runtime.Session,
    tokens: Tokens,
    reference: Reference,
    tolerance: float | OutputLimits,
    cuts_seed: int = 0,
) -> Iterator[VerifyReport]:
    """As `verify_stream`, with a report of the stream so far after each block."""
    limits = tolerance if isinstance(tolerance, OutputLimits) else OutputLimits(tolerance)
    graphs = [Graph(**graph) for graph in session.info["graphs"]]
    schedule = _Schedule(graphs, session.output_size)
    rng = np.random.default_rng(cuts_seed)
    feeds: dict[str, Callable[[Tokens, int], Iterable[Tokens]]] = {
        "whole": schedule.whole,
        "token_by_token": lambda block, start: (block[at : at + 1] for at in range(len(block))),
        "random_cuts": lambda block, start: schedule.random(block, start, rng),
    }
    streams = {name: session.stream() for name in feeds}
    distances = {name: Distance() for name in feeds}
    for start in range(0, max(1, len(tokens)), schedule.block_tokens):
        block = tokens[start : start + schedule.block_tokens]
        reference.advance(block)
        for name, cut in feeds.items():
            at = start
            for part in cut(block, start):
                schedule.count(at, len(part))
                outputs = _step(streams[name], part) if name == "token_by_token" else streams[name].feed(part)
                assert outputs is not None
                limit = limits.at(at, len(part))
                if limits.stability is not None:
                    limit = np.maximum(limit, reference.amplified(at, len(part)))
                distances[name].add(reference.errors(outputs, at), at, limit)
                at += len(part)
        yield VerifyReport(start + len(block), limits.tolerance, reference.own_error, dict(schedule.calls), distances)


def _step(stream: titans_runtime.Stream, one: Tokens) -> Outputs:
    """The output (1, size) of a token (1,) or a vector (1, size)."""
    return stream.step(one[0] if one.ndim == 2 else int(one[0]))[None]


@dataclass(frozen=True)
class Graph:
    """A graph of an open session, as `schedule.Scheduled`."""

    name: str
    tokens: int
    stride: int
    offsets: Sequence[int]


class _Schedule:
    """Cuts of blocks of a stream, and the calls that they make.

    calls: the number of calls of each graph. block_tokens: whole calls of the largest graph, so that blocks run as a
    single feed would; at least two, so that a graph with an offset fits into a block.
    """

    def __init__(self, graphs: Sequence[Graph], output_size: int) -> None:
        self._graphs = graphs
        self._largest = max(graph.tokens for graph in graphs)
        piece = max(1, _PIECE_BYTES // (self._largest * output_size * 4))
        self._piece_tokens, self.block_tokens = piece * self._largest, max(2, piece) * self._largest
        self.calls = dict.fromkeys((graph.name for graph in graphs), 0)

    def count(self, start: int, length: int) -> None:
        """Counts the calls of a feed of `length` tokens at position `start`."""
        for _, graph in calls(self._graphs, start, length):
            self.calls[graph.name] += 1

    def whole(self, block: Tokens, start: int) -> Iterator[Tokens]:
        """Pieces of whole calls, which together make the calls of one feed."""
        first = at = 0
        for position, graph in calls(self._graphs, start, len(block)):
            if position - start + graph.tokens - first > self._piece_tokens and at > first:
                yield block[first:at]
                first = at
            at = position - start + graph.tokens
        yield block[first:]

    def random(self, block: Tokens, start: int, rng: np.random.Generator) -> Iterator[Tokens]:
        """Random cuts. If the block has room, they begin with calls of the graphs that have not run so far."""
        at = 0
        for graph in self._graphs:
            ahead = next(n for n in range(graph.stride) if may_start(graph, start + at + n))
            if not self.calls[graph.name] and at + ahead + graph.tokens <= len(block):
                yield block[at : at + ahead]
                yield block[at + ahead : at + ahead + graph.tokens]
                at += ahead + graph.tokens
        yield from random_cuts(block[at:], self._largest, rng)


def random_cuts(tokens: Tokens, largest: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Cuts the tokens into feeds of random size: from 0 to twice the largest graph's tokens."""
    while len(tokens):
        size = int(rng.integers(0, rng.choice([1, 4, largest + 1, 2 * largest + 1])))
        yield tokens[:size]
        tokens = tokens[size:]
