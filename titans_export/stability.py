"""How far a model amplifies rounding errors, and the differences from PyTorch that this explains.

Some models are chaotic: they double any difference every few tokens. Two right implementations then agree only up to a
horizon. The sensitivity is measured: runs in float64 with simulated rounding errors, and the run in float32, show how
large a difference rounding makes up to each position. A larger difference is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoints import Checkpoint
from .errors import MismatchError
from .manifest import Limit, Stability
from .model import StreamModel
from .model.float64 import Rounded
from .model.rounding import unrounded
from .output_limits import FLOAT32_FACTOR, Floats, OutputLimits, amplifies, describe, first_beyond
from .progress import Advance
from .reference import (
    FLOAT32_SHARE,
    MOST_OF_RANGE,
    TOLERANCE,
    errors_of,
    follows,
    largest_of,
    library_outputs_of,
    run_outputs,
    tolerance_of,
    usual_tolerance,
)
from .row_file import Rows

SEEDS = (1, 2)  # of the runs with simulated rounding errors
# As FLOAT32_FACTOR, for float64. Our sums run in another order than the library's, and 2^8 of 2^52 costs little.
FLOAT64_FACTOR = 256.0
LIBRARY_TOLERANCE = 1e-9  # of our model in float64, as TOLERANCE
LONGEST_PERIOD = 1 << 16  # tokens searched for memory updates


class RunningError:
    """The largest difference of a stream's outputs from the right ones, (T, size), up to each position."""

    def __init__(self, right: Rows) -> None:
        self._right, self._at, self._parts = right, 0, [np.zeros(0)]

    def add(self, outputs: NDArray[Any]) -> None:
        """Compares the next outputs (t, size)."""
        begin, self._at = self._at, self._at + len(outputs)
        self._parts.append(errors_of(outputs, self._right[begin : self._at]))

    def finish(self) -> Floats:
        """The differences (T,). NaN counts as infinite."""
        error = np.concatenate(self._parts)
        largest: Floats = np.maximum.accumulate(np.where(np.isnan(error), np.inf, error))
        return largest


def running_error(got: Rows, right: Rows) -> Floats:
    """The largest difference of outputs (T, size) up to each position, (T,). NaN counts as infinite."""
    error = errors_of(got, right)
    largest: Floats = np.maximum.accumulate(np.where(np.isnan(error), np.inf, error))
    return largest


def model_error(
    model: StreamModel, inputs: torch.Tensor, right: Rows, advance: Advance = lambda tokens: None
) -> Floats:
    """`running_error` of the model's outputs, in the precision of the context, without keeping them."""
    error = RunningError(right)
    run_outputs(model, inputs, error.add, advance)
    return error.finish()


def sensitivity(model: StreamModel, inputs: torch.Tensor, right: Rows, double: bool = False) -> Floats:
    """The largest difference that simulated rounding errors make up to each position of the inputs, (T,).

    right: float64 outputs (T, size) of the inputs. The errors are those of float32, or of float64 with `double`.
    """
    found = np.zeros(inputs.shape[1])
    for seed in SEEDS:
        with unrounded(model), Rounded(seed, double):
            found = np.maximum(found, model_error(model, inputs, right))
    return found


def library_error_of(checkpoint: Checkpoint, inputs: torch.Tensor, float64: Rows) -> float | None:
    """The error of our model against the checkpoint's own library, both in float64, or None without that library.

    float64: our outputs (T, size). Raises MismatchError if it exceeds LIBRARY_TOLERANCE and what rounding in float64
    explains.
    """
    right = library_outputs_of(checkpoint, inputs)
    if right is None:
        return None
    model, inputs = checkpoint.model, inputs[:, : len(right)]
    error = running_error(right, float64)
    usual = LIBRARY_TOLERANCE / TOLERANCE * usual_tolerance(model, float(largest_of(right).max()))
    if not error[-1] <= usual:
        limits = np.maximum(usual, FLOAT64_FACTOR * sensitivity(model, inputs, float64, double=True))
        if beyond := first_beyond(error, limits):
            problem = f"PyTorch differs from the library that trained the checkpoint: {beyond}"
            raise MismatchError(
                "E0252", "export", problem, "check the configuration, and report the message if it is right"
            )
    return float(error[-1])


def stable_limits(
    model: StreamModel,
    inputs: torch.Tensor,
    right: Rows,
    own: Floats,
    accept_unstable: bool,
    progress: Callable[[str], None],
) -> OutputLimits:
    """The limits of a bundle's outputs.

    inputs: (1, T, ...). right: PyTorch's outputs (T, size) in float64. own: `running_error` of float32. If float32
    follows float64 over all positions, one tolerance applies to all. Otherwise the sensitivity is measured. Raises
    MismatchError if the horizon is shorter than `shortest_horizon`, unless `accept_unstable`.
    """
    if follows(model, right, float(own[-1])):
        return OutputLimits(tolerance_of(model, right, float(own[-1])))
    progress(f"float32 does not follow this model over {len(right)} tokens: measuring how it amplifies rounding")
    return _accepted(model, measured_limits(model, inputs, right, own), accept_unstable, progress)


def explained_limits(
    model: StreamModel,
    inputs: torch.Tensor,
    right: Rows,
    own: Floats,
    accept_unstable: bool,
    progress: Callable[[str], None],
) -> OutputLimits:
    """The limits of a bundle that exceeds `stable_limits`: all that rounding explains. Parameters as there.

    One run in float32 may round more luckily than another implementation, so the sensitivity is measured.
    """
    progress("the bundle differs by more than float32 PyTorch does: measuring how the model amplifies rounding")
    measured = np.maximum(own, sensitivity(model, inputs, right))
    most = FLOAT32_SHARE * FLOAT32_FACTOR * float(measured[-1])
    if follows(model, right, most):
        return OutputLimits(tolerance_of(model, right, most))
    return _accepted(model, limits_from(model, right, measured), accept_unstable, progress)


def _accepted(
    model: StreamModel, limits: OutputLimits, accept_unstable: bool, progress: Callable[[str], None]
) -> OutputLimits:
    """The limits, if their horizon is long enough."""
    assert limits.stability is not None
    horizon, least = limits.stability.horizon, shortest_horizon(model)
    if horizon < least and not accept_unstable:
        problem = (
            f"float32 follows this model over {horizon} tokens, and two memory updates need {least}: "
            f"{amplifies(limits.stability)}"
        )
        raise MismatchError("E0251", "export", problem, "train the model to be stable, or add --accept-unstable")
    progress(describe(limits.stability))
    return limits


def shortest_horizon(model: StreamModel) -> int:
    """The shortest horizon of a bundle without `--accept-unstable`, in tokens.

    These are the tokens of two memory updates. The second one reads what the first one wrote, so agreement over a
    shorter stream does not show that the memory learns right.
    """
    updates = accumulate(
        any(model.completing_tokens(graph, position))
        for position in range(LONGEST_PERIOD)
        for graph in model.graphs(1)
        if graph.tokens == 1 and position % graph.stride in graph.offsets
    )
    return next((number for number, count in enumerate(updates, 1) if count == 2), 1)


def measured_limits(model: StreamModel, inputs: torch.Tensor, right: Rows, own: Floats) -> OutputLimits:
    """The limits of a model that amplifies rounding; parameters as in `stable_limits`."""
    return limits_from(model, right, np.maximum(own, sensitivity(model, inputs, right)))


def limits_from(model: StreamModel, right: Rows, measured: Floats) -> OutputLimits:
    """The limits from the largest difference that rounding makes up to each position, (T,)."""
    count = len(right)
    largest = np.maximum.accumulate(largest_of(right))
    usual = usual_tolerance(model, float(largest[-1]))
    steps = _steps(usual, FLOAT32_FACTOR * measured, 2 * FLOAT32_FACTOR * float(largest[-1]))
    each = OutputLimits(usual, Stability(horizon=0, doubling=None, positions=count, limits=steps)).at(0, count)
    exact = each <= np.maximum(usual, MOST_OF_RANGE * largest)
    horizon = count if exact.all() else int(np.argmin(exact))
    tolerance = float(each[horizon - 1]) if horizon else usual
    stability = Stability(horizon=horizon, doubling=_doubling(measured, largest), positions=count, limits=steps)
    return OutputLimits(tolerance, stability)


def _doubling(measured: Floats, largest: Floats) -> float | None:
    """Tokens in which a difference doubles, up to the position where it is of the order of the outputs."""
    grown = measured > MOST_OF_RANGE * largest
    end = int(np.argmax(grown)) if grown.any() else len(measured) - 1
    if not end or not measured[0]:
        return None
    growth = math.log2(min(measured[end], largest[end]) / measured[0])
    return float(f"{end / growth:.3g}") if growth > 1 else None


def _steps(usual: float, wanted: Floats, most: float) -> tuple[Limit, ...]:
    """Limits that ascend by powers of two from the usual tolerance and are at least `wanted`, (T,), up to `most`."""
    steps = [Limit(start=0, limit=usual)]
    limit = usual
    for position, value in enumerate(wanted):
        if value <= limit:
            continue
        finite = value <= most
        limit = usual * 2.0 ** math.ceil(math.log2(value / usual)) if finite else math.inf
        step = Limit(start=position, limit=limit if finite else None)
        steps = [step] if position == 0 else [*steps, step]
        if not finite:
            break
    return tuple(steps)
