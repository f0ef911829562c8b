"""Computes a float32 model in float64, without a second copy of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that copy values and compute nothing, beside those that return views.
_EXACT = frozenset((torch.ops.aten.embedding.default, torch.ops.aten.index_select.default))


class Float64(TorchDispatchMode):
    """A context in which every operator computes in float64, whatever the dtype of its operands.

        with Float64(), torch.no_grad():
            outputs, state = model.feed(inputs, model.initial_state(1), 0)

    A float32 weight becomes float64 when an operator reads it, so only one weight at a time has a float64 copy. A cast
    to float32 becomes a cast to float64, so libraries whose layers cast to float32 compute in float64 as well. Views
    of float32 tensors stay float32. Operators must not write into float32 tensors from outside the context.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in _EXACT:
            return func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
            raise TypeError(f"{func} writes into a float32 tensor in a context of float64")
        return func(*map(_double, args), **{name: _double(value) for name, value in kwargs.items()})


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, list | tuple):
        return [_double(item) for item in value]
    return torch.float64 if value is torch.float32 else value
