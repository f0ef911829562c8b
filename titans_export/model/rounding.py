"""The rounding errors of parameters that a loader derives from a checkpoint's tensors.

A graph holds such parameters in float32. A reference in float64 adds what the rounding took away. It then agrees with
the checkpoint's library to float64 precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_REST = "_titans_rest"
_in_use = False


def keep_rest(parameter: Tensor, rest: Tensor) -> None:
    """Remembers what rounding took away from a parameter: float64, the parameter's shape."""
    setattr(parameter, _REST, rest)


def set_rounded(parameter: Tensor, value: Tensor) -> None:
    """Sets a float32 parameter to a float64 value and remembers the rounding error."""
    parameter.data.copy_(value)
    keep_rest(parameter, value - parameter.data.double())


def rest_in_use(parameter: Tensor) -> Tensor | None:
    """What rounding took away, within `unrounded`; otherwise None."""
    return getattr(parameter, _REST, None) if _in_use else None


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """A context in which derived float32 parameters have their float64 values. Use it around a context of `Float64`.

    A later change of a parameter keeps its effect, because the rounding error is added to the parameter's value.
    """
    global _in_use
    changed: list[tuple[Tensor, Tensor]] = []
    tensors = [*model.parameters(), *model.buffers()]
    before, _in_use = _in_use, True
    try:
        for tensor in tensors:
            rest = getattr(tensor, _REST, None)
            if rest is not None and tensor.dtype == torch.float32:
                changed.append((tensor, tensor.data))
                tensor.data = tensor.data.double() + rest
        yield
    finally:
        _in_use = before
        for tensor, data in changed:
            tensor.data = data
