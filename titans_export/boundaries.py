"""Runs a bundle's streams over the boundaries of its chunks, segments and windows, where faults of state show first.

At n C - 1, n C and n C + 1, with C each period of the bundle, streams are cut, forked, marked and rewound, saved and
restored, and batched. All but fast batches must then continue as a lone stream with the same calls, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .output_limits import OutputLimits
from .verifying import Errors, Outputs, Reference, Tokens, row_errors

if TYPE_CHECKING:
    import titans_runtime

    from .manifest import Manifest

OPERATIONS = ("cut", "fork", "mark", "save", "batch_exact", "batch_fast")
DELTAS = (-1, 0, 1)
_LONGEST_DETOUR = 256  # tokens


@dataclass(frozen=True)
class Fault:
    """An operation at a boundary after which a stream differs.

    boundary: position of the operation. at: the same as `2 x 64 - 1`. position: of the first wrong output.
    """

    operation: str
    boundary: int
    at: str
    position: int
    problem: str


@dataclass
class Operation:
    """What the sweep found about one operation.

    checks: boundaries it ran at. max_abs_error: the largest difference of an output from the lone stream's, or, for
    `cut`, from the references.
    """

    checks: int = 0
    max_abs_error: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no boundary showed a fault."""
        return not self.faults


@dataclass(frozen=True)
class BoundaryReport:
    """The result of `verify_boundaries`.

    positions: tokens of the stream. periods: C to the n of its boundaries, none if the stream is too short.
    streams_per_call: of fast batches; with 1 they run as exact ones.
    """

    positions: int
    tolerance: float
    periods: dict[int, list[int]]
    boundaries: list[int]
    streams_per_call: int
    operations: dict[str, Operation]

    @property
    def passed(self) -> bool:
        """Whether no operation showed a fault."""
        return all(operation.passed for operation in self.operations.values())

    @property
    def faults(self) -> list[Fault]:
        """All faults, by boundary."""
        found = [fault for operation in self.operations.values() for fault in operation.faults]
        return sorted(found, key=lambda fault: fault.boundary)


def periods_of(manifest: Manifest) -> list[int]:
    """Tokens after which chunks, segments, windows and the schedule of a bundle repeat, ascending."""
    found = {value for graph in manifest.graphs for value in (graph.tokens, graph.stride)}
    for state in manifest.state:
        found.add(state.chunk or 1)
        if state.rows is not None:
            found.add(state.rows.segment)
        if state.written is not None:
            found.add(state.written.period)
        elif state.role == "cache" and len(state.shape) > 2:
            found.add(state.shape[2])
    return sorted(found - {1}) or [1]


def multiples(period: int, count: int) -> list[int]:
    """1, 2, 3, the powers of two and the last n for which n * period + 1 is within `count` tokens."""
    last = (count - 2) // period
    powers = {1 << i for i in range(2, max(0, last).bit_length())}
    return sorted(n for n in {1, 2, 3, last} | powers if 0 < n <= last)


def verify_boundaries(
    sessions: tuple[titans_runtime.Session, titans_runtime.Session],
    periods: Iterable[int],
    tokens: Tokens,
    reference: Reference,
    limits: OutputLimits,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> BoundaryReport:
    """Sweeps all operations over all boundaries of one stream.

    sessions: of one bundle, with exact and with fast batches. tokens: (T,) int32, or (T, size) float32. seed: of
    the tokens of streams that only disturb.
    """
    chosen = {period: multiples(period, len(tokens)) for period in periods}
    operations = {name: Operation() for name in OPERATIONS}
    boundaries: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="titans-boundaries-") as folder:
        for delta in DELTAS:
            names = {
                n * period + delta: f"{n} x {period}{('', ' + 1', ' - 1')[delta]}"
                for period, several in chosen.items()
                for n in several
                if n * period + delta > 0
            }
            detours = {n * period + delta: period + 1 for period, several in chosen.items() for n in several}
            boundaries |= set(names)
            walk = _Walk(sessions, tokens, limits, np.random.default_rng((seed, delta + 1)), Path(folder), operations)
            walk.run(names, detours, reference.anew(), progress)
    per_call = int(sessions[1].info["batch"]["streams_per_call"])
    return BoundaryReport(len(tokens), limits.tolerance, chosen, sorted(boundaries), per_call, operations)


class _Walk:
    """One pass over the stream, cut at the boundaries of one delta.

    Every operation has its own stream, which takes the calls of the lone one. After a fault it begins anew.
    """

    def __init__(
        self,
        sessions: tuple[titans_runtime.Session, titans_runtime.Session],
        tokens: Tokens,
        limits: OutputLimits,
        rng: np.random.Generator,
        folder: Path,
        operations: dict[str, Operation],
    ) -> None:
        self._exact, self._fast = sessions
        self._tokens, self._limits, self._rng, self._folder = tokens, limits, rng, folder
        self._operations = operations
        self._calls: list[Tokens] = []
        self._lone, self._by_token = self._exact.stream(), self._exact.stream()
        self._streams = {name: self._exact.stream() for name in ("fork", "mark", "save")}
        self._batches = {"batch_exact": _Batch(self._exact), "batch_fast": _Batch(self._fast)}
        self._start, self._name, self._detour = 0, "0", 2

    def run(
        self,
        names: Mapping[int, str],
        detours: Mapping[int, int],
        reference: Reference,
        progress: Callable[[int], None],
    ) -> None:
        """Does every operation at each boundary and feeds each piece of the stream to all streams."""
        starts = [0, *sorted(names)]
        for start, end in zip(starts, [*starts[1:], len(self._tokens)], strict=True):
            piece = self._tokens[start:end]
            self._start, self._name = start, names.get(start, "0")
            self._detour = min(detours.get(start, 2), _LONGEST_DETOUR)
            reference.advance(piece)
            limits = self._limits.at(start, len(piece))
            if self._limits.stability is not None:
                limits = np.maximum(limits, reference.amplified(start, len(piece)))
            lone = _fed(self._lone, piece)
            self._cut(piece, lone, reference, limits)
            for name, operate in (("fork", self._fork), ("mark", self._mark), ("save", self._save)):
                self._check(name, operate, piece, lone)
            for name, batch in self._batches.items():
                bound = 0.0 if name == "batch_exact" else limits
                neighbours = [self._drawn(1), self._drawn(self._detour)]
                self._batch(name, batch, (piece, *neighbours), lone, bound)
            self._calls.append(piece)
            progress(len(piece))

    def _cut(self, piece: Tokens, lone: Outputs, reference: Reference, limits: Errors) -> None:
        """Compares the cut stream with one fed token by token, and both with the reference."""
        stepped = np.concatenate([_fed(self._by_token, piece[at : at + 1]) for at in range(len(piece))])
        errors = np.max(
            [row_errors(lone, stepped), reference.errors(lone, self._start), reference.errors(stepped, self._start)],
            axis=0,
        )
        self._record("cut", errors, limits)

    def _fork(self, stream: titans_runtime.Stream) -> titans_runtime.Stream:
        """A fork whose parent and child have gone elsewhere."""
        fork = stream.fork()
        self._disturb(stream)
        stream.close()
        child = fork.fork()
        self._disturb(child)
        child.close()
        return fork

    def _mark(self, stream: titans_runtime.Stream) -> titans_runtime.Stream:
        """The stream after it went elsewhere and came back to its mark."""
        position = stream.mark()
        self._disturb(stream)
        stream.rewind(position)
        stream.unmark(position)
        return stream

    def _save(self, stream: titans_runtime.Stream) -> titans_runtime.Stream:
        """The stream from its file."""
        path = self._folder / "stream.tstate"
        stream.save(path)
        stream.close()
        return self._exact.restore(path)

    def _check(
        self,
        name: str,
        operate: Callable[[titans_runtime.Stream], titans_runtime.Stream],
        piece: Tokens,
        right: Outputs,
    ) -> None:
        """Feeds the piece after the operation. A stream with a fault is made again from the calls so far."""
        import titans_runtime

        good = False
        try:
            stream = self._streams[name] = operate(self._streams[name])
            if stream.position == self._start:
                good = self._record(name, _differences(_fed(stream, piece), right), 0.0)
            else:
                self._failed(name, f"position {stream.position} in place of {self._start}")
        except titans_runtime.Error as error:
            self._failed(name, str(error))
        if not good:
            self._streams[name] = self._again(self._exact, [*self._calls, piece])

    def _batch(self, name: str, batch: _Batch, given: tuple[Tokens, ...], lone: Outputs, bound: float | Errors) -> None:
        """Feeds the piece in a batch, beside the piece before to a stream one piece behind, and two neighbours."""
        import titans_runtime

        try:
            rows, late = batch.feed(*given)
            good = self._record(name, _differences(rows, lone), bound)
            if batch.before is not None:
                right, limit, start = batch.before
                self._operations[name].checks -= 1  # a second look at one boundary
                good &= self._record(name, _differences(late, right), limit, start)
            batch.before = lone, bound, self._start
        except titans_runtime.Error as error:
            self._failed(name, str(error))
            good = False
        if not good:
            session = batch.session
            calls = [*self._calls, given[0]]
            self._batches[name] = again = _Batch(session)
            again.streams = [self._again(session, calls), self._again(session, calls[:-1]), again.streams[2]]
            again.piece, again.before = given[0], (lone, bound, self._start)

    def _record(self, name: str, errors: Errors, bound: float | Errors, start: int | None = None) -> bool:
        """Adds errors (t,) of outputs from `start` on, and the fault if one exceeds its bound."""
        start = self._start if start is None else start
        operation = self._operations[name]
        operation.checks += 1
        operation.max_abs_error = max(operation.max_abs_error, float(errors.max(initial=0.0)))
        bad = np.flatnonzero(errors > bound)
        if not bad.size:
            return True
        limit = float(np.broadcast_to(bound, errors.shape)[bad[0]])
        wanted = "equal bits" if limit == 0 else f"at most {limit:.3g}"
        self._fault(name, start + int(bad[0]), f"expected {wanted}, got a difference of {errors[bad[0]]:.3g}")
        return False

    def _failed(self, name: str, problem: str) -> None:
        self._operations[name].checks += 1
        self._fault(name, self._start, problem)

    def _fault(self, name: str, position: int, problem: str) -> None:
        self._operations[name].faults.append(Fault(name, self._start, self._name, position, problem))

    def _again(self, session: titans_runtime.Session, calls: Iterable[Tokens]) -> titans_runtime.Stream:
        stream = session.stream()
        for call in calls:
            stream.feed(call, outputs="none")
        return stream

    def _disturb(self, stream: titans_runtime.Stream) -> None:
        stream.feed(self._drawn(self._detour), outputs="none")

    def _drawn(self, count: int) -> Tokens:
        """Random inputs of a stream that is not compared."""
        if self._tokens.ndim == 2:
            return self._rng.standard_normal((count, self._tokens.shape[1]), np.float32)
        return self._rng.integers(0, self._exact.vocab_size, count, np.int32)


class _Batch:
    """Streams of one batch: one at the boundary, one a piece behind, and one with tokens of its own."""

    def __init__(self, session: titans_runtime.Session) -> None:
        self.session = session
        self.streams = [session.stream() for _ in range(3)]
        self.piece: Tokens | None = None
        self.before: tuple[Outputs, float | Errors, int] | None = None

    def feed(self, piece: Tokens, joins: Tokens, neighbour: Tokens) -> tuple[Outputs, Outputs]:
        """Outputs of the piece and of the piece before. `joins` goes to a stream that is there for this call only."""
        late = piece[:0] if self.piece is None else self.piece
        with self.session.stream() as joined:
            streams = [joined, self.streams[0], self.streams[2], self.streams[1]]
            rows: Any = self.session.feed_batch(streams, [joins, piece, neighbour, late], outputs="all")
        self.piece = piece
        return rows[1], rows[3]


def _differences(outputs: Outputs, right: Outputs) -> Errors:
    """As `row_errors`, but 0 for equal NaN and infinity, and above 0 for any unequal bits."""
    errors = row_errors(outputs, right)
    equal = (outputs.view(np.uint32) == right.view(np.uint32)).all(-1)
    return np.where(equal, 0.0, np.maximum(errors, np.finfo(np.float64).tiny))


def _fed(stream: titans_runtime.Stream, piece: Tokens) -> Outputs:
    outputs = stream.feed(piece)
    assert outputs is not None
    return outputs
