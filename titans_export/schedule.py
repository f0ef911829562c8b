"""The schedule of a bundle: which graph runs next. docs/bundle.md, Schedule, is the contract."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Protocol, TypeVar

LONGEST_PERIOD = 1 << 20  # positions after which the decode graphs together repeat


class Scheduled(Protocol):
    """A graph that consumes `tokens` tokens and may start where position % stride is one of `offsets`, ascending."""

    @property
    def name(self) -> str:
        """The graph's name."""

    @property
    def tokens(self) -> int:
        """Tokens of a call."""

    @property
    def stride(self) -> int:
        """The period of the positions where the graph may start."""

    @property
    def offsets(self) -> Sequence[int]:
        """Those positions modulo the stride."""


G = TypeVar("G", bound=Scheduled)


def may_start(graph: Scheduled, position: int) -> bool:
    """Whether the graph may run at that position."""
    return position % graph.stride in graph.offsets


def next_graph(graphs: Sequence[G], position: int, remaining: int) -> G:
    """The graph with most tokens that may start at `position` and consumes at most `remaining` >= 1 tokens."""
    fitting = [graph for graph in graphs if graph.tokens <= remaining and may_start(graph, position)]
    return max(fitting, key=lambda graph: graph.tokens)


def calls(graphs: Sequence[G], position: int, count: int) -> Iterator[tuple[int, G]]:
    """The calls that consume `count` tokens from `position` on: the position before each and its graph."""
    end = position + count
    while position < end:
        graph = next_graph(graphs, position, end - position)
        yield position, graph
        position += graph.tokens


def covering_cuts(graphs: Sequence[Scheduled]) -> list[int]:
    """Lengths of feeds from a fresh stream after which every graph has run."""
    cuts: list[int] = []
    unseen = {graph.name for graph in graphs}
    for graph in graphs:
        # Feed up to a position where the graph may start, then exactly its tokens.
        while graph.name in unseen:
            start = sum(cuts)
            ahead = next(n for n in range(graph.stride) if may_start(graph, start + n))
            for length in (ahead, graph.tokens):
                at = sum(cuts)
                cuts += [length] * (length > 0)
                unseen -= {run.name for _, run in calls(graphs, at, length)}
    return cuts


def missing(graphs: Sequence[Scheduled]) -> str | None:
    """The expectation that graphs must meet to be a schedule and do not, None for a schedule."""
    for one, other in combinations(graphs, 2):
        if one.tokens == other.tokens and _meet(one, other):
            return f"no two graphs of equal tokens at one position, but {one.name} and {other.name} share one"
    decoding = [graph for graph in graphs if graph.tokens == 1]
    period = 1
    for graph in decoding:
        period = math.lcm(period, graph.stride)
        if period > LONGEST_PERIOD:
            return f"graphs with tokens = 1 that repeat within {LONGEST_PERIOD} positions"
    served = {at for graph in decoding for offset in graph.offsets for at in range(offset, period, graph.stride)}
    lacking = next((at for at in range(period) if at not in served), None)
    if lacking is not None:
        return f"a graph with tokens = 1 at every position, also at {lacking} modulo {period}"
    return None


def _meet(one: Scheduled, other: Scheduled) -> bool:
    """Whether both may start at one position: offsets agree modulo the strides' greatest common divisor."""
    common = math.gcd(one.stride, other.stride)
    return not {offset % common for offset in one.offsets}.isdisjoint(offset % common for offset in other.offsets)
