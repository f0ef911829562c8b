"""Which graph of a bundle runs next. docs/bundle.md, Schedule, is the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from .errors import BundleError

LONGEST_PERIOD = 1 << 20  # of the graphs of a single token together

Graph = dict[str, Any]  # as the manifest has it


def offsets(graph: Graph) -> list[int]:
    """The values of `position % stride` where the graph may start, ascending."""
    found: list[int] = graph.get("offsets", [0])
    return found


def may_start(graph: Graph, position: int) -> bool:
    """Whether the graph may run at that position."""
    return position % graph["stride"] in offsets(graph)


def next_graph(graphs: Sequence[Graph], position: int, remaining: int) -> Graph:
    """The graph with most tokens that may run there and takes no more than so many, of graphs that are a schedule."""
    fitting = [graph for graph in graphs if graph["tokens"] <= remaining and may_start(graph, position)]
    return max(fitting, key=lambda graph: int(graph["tokens"]))


def missing(graphs: Sequence[Graph]) -> str | None:
    """What well-formed graphs need to be a schedule and do not have, as an error's expectation."""
    for one, other in combinations(graphs, 2):
        if one["tokens"] == other["tokens"] and _meet(one, other):
            names = f"{one['name']} and {other['name']}"
            return f"a schedule where no two graphs of equal tokens start at the same position, as {names} do"
    singles = [graph for graph in graphs if graph["tokens"] == 1]
    period = 1
    for graph in singles:
        period = math.lcm(period, graph["stride"])
        if period > LONGEST_PERIOD:
            return f"a schedule whose graphs with tokens = 1 repeat within {LONGEST_PERIOD} positions"
    served = {at for graph in singles for offset in offsets(graph) for at in range(offset, period, graph["stride"])}
    lacking = next((at for at in range(period) if at not in served), None)
    if lacking is not None:
        return f"a schedule where a graph with tokens = 1 starts at every position, also at {lacking} modulo {period}"
    return None


def check_schedule(graphs: Any, remedy: str) -> None:
    """Raises BundleError where the manifest's graphs are not well formed or are no schedule."""
    if not isinstance(graphs, list) or not all(isinstance(graph, dict) for graph in graphs):
        raise BundleError("bundle", "graphs of the manifest to be a list of objects", repr(graphs)[:80], remedy)
    for graph in graphs:
        name = graph.get("name")
        for key in ("tokens", "stride"):
            if not _is_integer(graph.get(key)) or graph[key] < 1:
                raise BundleError("bundle", f"{key} of the graph {name} from 1 on", repr(graph.get(key)), remedy)
        found = offsets(graph)
        if (
            not isinstance(found, list)
            or not found
            or not all(_is_integer(offset) and 0 <= offset < graph["stride"] for offset in found)
            or found != sorted(set(found))
        ):
            expected = f"offsets of the graph {name}, ascending, each from 0 on and below stride"
            raise BundleError("bundle", expected, repr(found)[:80], remedy)
    if lacks := missing(graphs):
        names = ", ".join(str(graph.get("name")) for graph in graphs)
        raise BundleError("bundle", lacks, names or "none", remedy)


def _meet(one: Graph, other: Graph) -> bool:
    """Whether both may start at the same position: where offsets agree modulo what the strides have in common."""
    common = math.gcd(one["stride"], other["stride"])
    return not {offset % common for offset in offsets(one)}.isdisjoint(offset % common for offset in offsets(other))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
