"""One row of the layer benchmark: the memory, the kind of calls, and the input tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from titans_export.model.memory import MemorySpec

from . import costs

Array = NDArray[np.float32]
KINDS = ("prefill", "mac", "decode")


@dataclass(frozen=True)
class Tokens:
    """A stream's operands, float32.

    weights: per layer (B, H, in, out). q, k, v, context: (B, H, T, D); context holds the queries that MAC reads with
    before the update. step_size, momentum, forget_gate: (B, H, T).
    """

    weights: list[Array]
    q: Array
    k: Array
    v: Array
    context: Array
    step_size: Array
    momentum: Array
    forget_gate: Array

    @property
    def operands(self) -> dict[str, Array]:
        """The update's inputs, by the operator's names."""
        names = ("q", "k", "v", "step_size", "momentum", "forget_gate")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Case:
    """A memory of `heads` heads for `streams` streams, float32, and the calls of one pass over `tokens` tokens.

    kind: "prefill": all tokens in as few calls as the baseline allows.
    "mac": chunk by chunk, a read and then an update by that chunk, because MAC's attention runs in between.
    "decode": one token per call.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    streams: int
    heads: int
    chunk: int
    tokens: int
    threads: int

    @property
    def spec(self) -> MemorySpec:
        return MemorySpec(self.widths, chunk_size=self.chunk)

    @property
    def flop_per_token(self) -> int:
        """FLOP per token, over all streams and heads."""
        flop = costs.update_flop(self.widths, self.chunk)
        if self.kind == "mac":
            flop += costs.read_flop(self.widths)
        return self.streams * self.heads * flop

    @property
    def decode_bytes_per_token(self) -> float:
        """Bytes per token in the cached form, over all streams and heads."""
        return self.streams * self.heads * costs.decode_bytes(self.widths, self.chunk)

    @property
    def decode_working_set(self) -> int:
        """Bytes that decoding reuses, over all streams and heads."""
        return self.streams * self.heads * costs.decode_working_set(self.widths, self.chunk)

    @cached_property
    def data(self) -> Tokens:
        """The same random tokens in every process, with unit keys and queries and realistic gates.

        The step size is at most (1 - momentum) / chunk, so that the memory stays stable over any number of tokens.
        """
        rng = np.random.default_rng([self.streams, self.heads, self.chunk, *self.widths])
        lead, width = (self.streams, self.heads), self.widths[0]

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        def uniform(low: float, high: float) -> Array:
            return (low + (high - low) * rng.random((*lead, self.tokens))).astype(np.float32)

        def unit(x: Array) -> Array:
            normed: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
            return normed

        weights = [normal(*lead, i, o) / np.float32(i**0.5) for i, o in self.spec.shapes]
        momentum = uniform(0.8, 0.99)
        return Tokens(
            weights=weights,
            q=unit(normal(*lead, self.tokens, width)),
            k=unit(normal(*lead, self.tokens, width)),
            v=normal(*lead, self.tokens, width),
            context=unit(normal(*lead, self.tokens, width)),
            step_size=uniform(0, 1) * (1 - momentum) / np.float32(self.chunk),
            momentum=momentum,
            forget_gate=uniform(0, 0.02),
        )


def rows(
    head_dim: int, hidden: int, streams: int, heads: int, chunk: int, tokens: int, decode_tokens: int, threads: int
) -> list[Case]:
    """All rows: every kind, for the MLP and for the linear memory."""
    memories = {"mlp": (head_dim, hidden, head_dim), "linear": (head_dim, head_dim)}
    return [
        Case(
            f"{memory}-{kind}",
            kind,
            widths,
            streams,
            heads,
            chunk,
            decode_tokens if kind == "decode" else tokens,
            threads,
        )
        for kind in KINDS
        for memory, widths in memories.items()
    ]
