"""Compares single calls of a bundle's graphs with PyTorch, each from the same state.

A chaotic model forgets a rounding error within its horizon, and a fault beyond it looks like one. Calls from a state of
the float64 reference start without a difference, at any position of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bundle import Bundle
from .errors import MismatchError
from .manifest import read_manifest
from .model import Call, Graph, StreamModel
from .model.float64 import Float64, Rounded
from .model.layers import StreamState
from .model.rounding import unrounded
from .output_limits import FLOAT32_FACTOR
from .reference import TOLERANCE, usual_tolerance
from .running import Arrays, BundleRunner
from .schedule import may_start
from .stability import SEEDS, running_error

Result = tuple[Tensor, StreamState]


def places_of(model: StreamModel, graph: Graph, positions: int) -> list[int]:
    """Positions from which the graph is compared: the first, middle and last ones of those where it may start.

    For a graph of one token they are chosen among those that complete a chunk and among the others.
    """
    starts = [at for at in range(positions - graph.tokens + 1) if may_start(graph, at)]
    groups = [starts]
    if graph.tokens == 1:
        completing = [at for at in starts if any(model.completing_tokens(graph, at))]
        groups = [completing, [at for at in starts if at not in set(completing)]]
    return sorted({group[at] for group in groups if group for at in (0, len(group) // 2, -1)})


def check_calls(folder: Path, model: StreamModel, graphs: Sequence[Graph], inputs: Tensor) -> None:
    """Compares calls of every graph of the bundle in a folder. inputs: (1, T, ...), as in `outputs_of`.

    Raises MismatchError if an output or a state differs by more than rounding explains.
    """
    runner = BundleRunner(Bundle(folder, read_manifest(folder)))
    entries = {entry.name: entry for entry in runner.graphs}
    places = [(at, graph) for graph in graphs for at in places_of(model, graph, inputs.shape[1])]
    state, position = model.initial_state(1), 0
    for at, graph in sorted(places, key=lambda place: place[0]):
        with unrounded(model), Float64():
            _, state = model.feed(inputs[:, position:at], state, position)
        position = at
        part = inputs[:, at : at + graph.tokens]
        given = {name: value.detach().float() for name, value in state.items()}
        arrays = {name: value.contiguous().numpy() for name, value in given.items()}
        got = runner.run(entries[graph.name], part[0].numpy(), at, arrays)
        _check_call(model, graph, at, part, given, (got.values[runner.output][0], got.state))


def _check_call(
    model: StreamModel, graph: Graph, at: int, part: Tensor, given: StreamState, got: tuple[Any, Arrays]
) -> None:
    call = Call(graph, torch.tensor([at]), torch.tensor([True]))

    def run() -> tuple[Any, Arrays]:
        with torch.no_grad():
            outputs, state = model.call(part, given, call)
        return outputs[0].numpy(), {name: value.numpy() for name, value in state.items()}

    with unrounded(model), Float64():
        right, right_state = run()
    rounded = [run()]
    for seed in SEEDS:
        with unrounded(model), Rounded(seed):
            rounded.append(run())
    usual = usual_tolerance(model, float(np.abs(right).max()))
    measured = np.max([running_error(outputs, right) for outputs, _ in rounded], 0)
    error = running_error(got[0], right)
    limit = np.maximum(usual, FLOAT32_FACTOR * measured)
    wrong = np.flatnonzero(error > limit)
    if wrong.size:
        first = int(wrong[0])
        raise _mismatch(graph, at + first, model.output.name, float(error[first]), float(limit[first]))
    completes = graph.tokens > 1 or any(model.completing_tokens(graph, at))
    for name, values in right_state.items():
        used = _used(model, name, values.shape[-1], completes)
        values = values[..., used]
        own = [_distance(state[name][..., used], values) for _, state in rounded]
        most = max(TOLERANCE * min(1.0, float(np.abs(values).max(initial=0.0))), FLOAT32_FACTOR * max(own))
        if not (distance := _distance(got[1][name][..., used], values)) <= most:
            raise _mismatch(graph, at, f"state {name}", distance, most)


def _used(model: StreamModel, name: str, size: int, completes: bool) -> NDArray[np.bool_]:
    """The values of a state tensor's rows, (size,), that later calls read.

    After a call that completes a chunk, the rows of the next one are free: kernels keep old values there.
    """
    used = np.ones(size, bool)
    for field in model.state_info()[name].layout if completes else ():
        if field.kind in ("open_chunk", "coefficient"):
            used[field.offset : field.offset + field.words] = False
    return used


def _distance(one: Any, other: Any) -> float:
    """The largest difference, infinite for NaN."""
    return float(np.nan_to_num(np.abs(one - other), nan=np.inf, posinf=np.inf).max(initial=0.0))


def _mismatch(graph: Graph, position: int, name: str, error: float, limit: float) -> MismatchError:
    problem = (
        f"graph {graph.name} differs from PyTorch from the same state: {name} at position {position} by {error:.3g}, "
        f"more than rounding explains, {limit:.3g}"
    )
    return MismatchError("E0901", "export", problem, "report the message with the checkpoint's configuration")
