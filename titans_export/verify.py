"""Compares a bundle in the runtime with reference outputs, for any cuts of the stream into calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    import titans_runtime

    from .model import StreamModel

Tokens = npt.NDArray[Any]  # (T,) int32, or (T, size) float32 for a bundle that takes vectors
Logits = npt.NDArray[Any]  # (T, size)

# Maximum size of a block's outputs. Every stream is fed one block before the next, so that any length fits.
_BLOCK_BYTES = 32 << 20


class Reference(Protocol):
    """The reference outputs. `advance` is called for consecutive blocks of the stream."""

    def advance(self, tokens: Tokens) -> Logits:
        """Outputs after each token, (T, size)."""

    @property
    def own_error(self) -> float | None:
        """Largest error of these outputs so far, None if unknown."""


class Golden:
    """Golden outputs."""

    own_error = None

    def __init__(self, logits: Logits) -> None:
        self._logits, self._done = logits, 0

    def advance(self, tokens: Tokens) -> Logits:
        """The next outputs."""
        start, self._done = self._done, self._done + len(tokens)
        return self._logits[start : self._done]


class PyTorch:
    """The model in PyTorch, in float32 and in float64."""

    def __init__(self, model: StreamModel) -> None:
        single, double = model.float(), copy.deepcopy(model).double()
        self._models = (single, double)
        self._states = [single.initial_state(1), double.initial_state(1)]
        self._position = 0
        self._error = 0.0

    @property
    def own_error(self) -> float:
        """Largest difference between float32 and float64 so far."""
        return self._error

    def advance(self, tokens: Tokens) -> Logits:
        """The float32 outputs of the tokens; advances both models."""
        import torch

        vectors = tokens.dtype.kind == "f"
        batch = torch.from_numpy(tokens if vectors else tokens.astype(np.int64))[None]
        logits: list[torch.Tensor] = []
        for i, model in enumerate(self._models):
            given = batch.double() if vectors and i else batch
            out, self._states[i] = model.feed(given, self._states[i], self._position)
            logits.append(out[0])
        self._position += len(tokens)
        if len(tokens):
            self._error = max(self._error, float((logits[0].double() - logits[1]).abs().max()))
        result: Logits = logits[0].numpy()
        return result


@dataclass
class Distance:
    """Largest difference of a stream's outputs from the reference."""

    max_abs_error: float = 0.0
    first_bad_position: int | None = None

    def add(self, got: Logits, right: Logits, position: int, tolerance: float) -> None:
        """Adds the outputs from `position` on. NaN counts as an infinite difference."""
        error = np.abs(got.astype(np.float64) - right).max(-1, initial=0.0)
        error = np.where(np.isnan(error), np.inf, error)
        self.max_abs_error = max(self.max_abs_error, float(error.max(initial=0.0)))
        bad = np.flatnonzero(error > tolerance)
        if self.first_bad_position is None and bad.size:
            self.first_bad_position = position + int(bad[0])


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_stream`; `feeds` has the distance for each way of feeding the stream."""

    positions: int
    tolerance: float
    pytorch_float32_to_float64: float | None
    feeds: dict[str, Distance] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every output was within the tolerance."""
        return self.first_bad_position is None

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
    tolerance: float,
    cuts_seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> VerifyReport:
    """Compares all outputs of three streams: fed whole, token by token and in random cuts.

    `tokens`: (T,) int32, or (T, size) float32 for a bundle that takes vectors.
    """
    largest = max(graph["tokens"] for graph in session.info["graphs"])
    rng = np.random.default_rng(cuts_seed)
    feeds: dict[str, Callable[[titans_runtime.Stream, Tokens], Logits]] = {
        "whole": lambda stream, block: _feed(stream, [block]),
        "token_by_token": lambda stream, block: np.stack([stream.step(_one(token)) for token in block]),
        "random_cuts": lambda stream, block: _feed(stream, random_cuts(block, largest, rng)),
    }
    streams = {name: session.stream() for name in feeds}
    distances = {name: Distance() for name in feeds}
    # Whole calls of the largest graph, so that blocks run as a single feed would.
    calls = max(1, _BLOCK_BYTES // (largest * session.output_size * 4))
    for start in range(0, len(tokens), calls * largest):
        block = tokens[start : start + calls * largest]
        right = reference.advance(block)
        for name, feed in feeds.items():
            distances[name].add(feed(streams[name], block), right, start, tolerance)
        progress(len(block))
    return VerifyReport(len(tokens), tolerance, reference.own_error, distances)


def _one(token: Any) -> Any:
    """The argument of `step`: an int, or a vector."""
    return token if np.ndim(token) else int(token)


def _feed(stream: titans_runtime.Stream, cuts: Iterable[Tokens]) -> Logits:
    """All outputs of the cuts, fed in order."""
    rows = [stream.feed(cut) for cut in cuts]
    return np.concatenate([row for row in rows if row is not None])


def random_cuts(tokens: Tokens, largest: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Cuts the tokens into feeds of random size: from 0 to twice the largest graph's tokens."""
    while len(tokens):
        size = int(rng.integers(0, rng.choice([1, 4, largest + 1, 2 * largest + 1])))
        yield tokens[:size]
        tokens = tokens[size:]
