"""What PyTorch and the checkpoint's own library compute, and how closely a bundle must agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoints import Checkpoint
from .errors import MismatchError
from .model import Call, StreamModel
from .model.float64 import Float64
from .model.rounding import unrounded
from .progress import Advance
from .row_file import Rows
from .schedule import calls

TOLERANCE = 1e-4  # absolute, on outputs
# Orthogonalised updates amplify rounding errors. If float32 PyTorch differs from float64 by more than FLOAT32_SHARE of
# the tolerance, the tolerance becomes that difference divided by the share. If it would exceed MOST_OF_RANGE of the
# largest output, float32 is too imprecise for the model: stability.py measures up to which position it is not.
FLOAT32_SHARE = 0.25
MOST_OF_RANGE = 0.01
_BLOCK = 1 << 22  # outputs that are compared at a time
_CALL = 1 << 23  # most outputs of a call of several chunks
_CHUNKS = 16  # most chunks in a call
ORACLE_POSITIONS = 640  # most positions that run through the checkpoint's own library


def exact_outputs_of(
    model: StreamModel, inputs: torch.Tensor, advance: Advance = lambda tokens: None
) -> NDArray[np.float64]:
    """The outputs of `outputs_of` in float64, with derived parameters in float64 too."""
    with unrounded(model), Float64():
        return outputs_of(model, inputs, advance)


def outputs_of(model: StreamModel, inputs: torch.Tensor, advance: Advance = lambda tokens: None) -> NDArray[Any]:
    """Outputs (T, size) of one stream from a new memory, in float64 in a context of `Float64`.

    advance: takes the tokens of each call.
    """
    parts: list[NDArray[Any]] = []
    run_outputs(model, inputs, parts.append, advance)
    return np.concatenate(parts)


@torch.no_grad()
def run_outputs(
    model: StreamModel,
    inputs: torch.Tensor,
    take: Callable[[NDArray[Any]], None],
    advance: Advance = lambda tokens: None,
) -> None:
    """Passes the outputs of `outputs_of` to `take`, (t, size) of each call in order.

    Calls are long, so that weights are read seldom. Only one call's outputs are in memory.
    """
    shortest = min((graph.tokens for graph in model.graphs(1) if graph.tokens > 1), default=1)
    chunks = min(_CHUNKS, max(1, _CALL // (shortest * model.output.size)))
    state, length = model.initial_state(1), inputs.shape[1]
    learn = torch.ones(1, dtype=torch.bool)
    for at, graph in calls(model.graphs(chunks), 0, length):
        call = Call(graph, torch.full((1,), at), learn)
        y, state = model.call(inputs[:, at : at + graph.tokens], state, call)
        take(y[0].numpy())
        advance(graph.tokens)


def errors_of(outputs: Rows, right: Rows) -> NDArray[Any]:
    """The largest absolute difference (T,) of each row of outputs (T, size) and of as many right rows.

    Computed in blocks of rows.
    """
    step, count = max(1, _BLOCK // right.shape[1]), len(outputs)
    ends = [*range(step, count, step), count]
    return np.concatenate(
        [np.abs(outputs[at:end] - right[at:end]).max(-1) for at, end in zip([0, *ends[:-1]], ends, strict=True)]
    )


def largest_of(rows: Rows) -> NDArray[Any]:
    """The largest absolute value (T,) of each row, computed in blocks."""
    step = max(1, _BLOCK // rows.shape[1])
    return np.concatenate([np.abs(rows[at : at + step]).max(-1) for at in range(0, len(rows), step)])


def usual_tolerance(model: StreamModel, largest: float) -> float:
    """The tolerance of a stable model, given its largest output. For vectors below 1 it is relative to that."""
    return TOLERANCE * (min(1.0, largest) if model.output.kind == "vectors" else 1.0)


def follows(model: StreamModel, right: Rows, own_error: float) -> bool:
    """Whether float32, with the error `own_error`, is precise enough for this model. False for NaN."""
    largest = float(largest_of(right).max())
    return own_error / FLOAT32_SHARE <= max(usual_tolerance(model, largest), MOST_OF_RANGE * largest)


def tolerance_of(model: StreamModel, right: Rows, own_error: float) -> float:
    """The absolute tolerance of a bundle's outputs, given the error `own_error` of float32 PyTorch.

    It is rounded up to one digit, so that machines that differ in the last bits write the same manifest. Raises
    MismatchError unless `follows`.
    """
    largest = float(largest_of(right).max())
    if not follows(model, right, own_error):
        problem = (
            f"float32 is too imprecise for this model: PyTorch in float32 is {own_error:.3g} from float64, "
            f"more than {MOST_OF_RANGE * FLOAT32_SHARE:.2%} of the largest output, {largest:.3g}"
        )
        raise MismatchError("E0251", "export", problem, "measure up to which position float32 follows the model")
    wanted = max(own_error / FLOAT32_SHARE, usual_tolerance(model, largest))
    unit = 10.0 ** math.floor(math.log10(max(wanted, 1e-30)))
    return float(f"{math.ceil(wanted / unit - 1e-9) * unit:.1g}")


def library_outputs_of(checkpoint: Checkpoint, inputs: torch.Tensor) -> NDArray[Any] | None:
    """Outputs (T, size) of the checkpoint's own library in float64, or None without that library.

    T is at most ORACLE_POSITIONS.
    """
    oracle = checkpoint.oracle() if checkpoint.oracle else None
    if oracle is None:
        return None
    inputs = inputs[:, :ORACLE_POSITIONS]
    outputs: NDArray[Any] = oracle(inputs.double() if inputs.is_floating_point() else inputs)[0].numpy()
    return outputs
