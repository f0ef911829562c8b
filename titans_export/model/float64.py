"""Computes a float32 model in float64, without a second copy of its weights, also with simulated rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Operators that copy values and compute nothing, beside those that return views.
_EXACT = frozenset((_aten.embedding.default, _aten.index_select.default))
# Operators that copy values but may mix dtypes, or cast.
_COPIES = frozenset(
    (
        _aten._to_copy.default,
        _aten.cat.default,
        _aten.clone.default,
        _aten.constant_pad_nd.default,
        _aten.copy_.default,
        _aten.index.Tensor,
        _aten.index_put.default,
        _aten.stack.default,
        _aten.where.self,
        _aten.where.ScalarSelf,
        _aten.where.ScalarOther,
    )
)


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
        read = _double if func in _COPIES else self.operand
        return func(
            *(_each(value, read) for value in args), **{name: _each(value, read) for name, value in kwargs.items()}
        )

    def operand(self, value: Tensor) -> Tensor:
        """A floating-point operand as an operator that computes reads it."""
        return _double(value)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.dtype == torch.float32 else value


def _each(value: Any, read: Callable[[Tensor], Tensor]) -> Any:
    """An argument with its floating-point tensors read, and float32 as a dtype replaced."""
    if isinstance(value, Tensor):
        return read(value) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return [_each(item, read) for item in value]
    return torch.float64 if value is torch.float32 else value


class Rounded(Float64):
    """A context like `Float64` in which operators read operands with rounding errors.

    Two runs with different seeds differ as two implementations in the same precision do, so their differences show how
    far the model amplifies rounding. An error is that of a float32 value or, with `double`, of a float64 value, at most
    half a unit in the last place. It is drawn anew whenever an operator computes with a value.
    """

    def __init__(self, seed: int, double: bool = False) -> None:
        super().__init__()
        self._random, self._rounded = Random(seed), torch.float64 if double else torch.float32

    def operand(self, value: Tensor) -> Tensor:
        """The operand in float64, off by a rounding error."""
        # Rounding the value times a random number gives each element another error than rounding the value.
        scale = self._random.uniform(1, 2)
        return (value.double() * scale).to(self._rounded).double() / scale
