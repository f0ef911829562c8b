"""Helpers that emit one ONNX construct each: an operator's node, an `If`, a `Scan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import DOMAIN, VERSION, Operator

Step = Callable[[list[Tensor], list[Tensor], int], tuple[list[Tensor], list[Tensor]]]


def node(
    operator: Operator,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Tensor | None],
    shapes: Sequence[Sequence[int]],
) -> tuple[Tensor, ...]:
    """Emits one node; only while exporting. inputs: by name, None for absent ones. shapes: those of the outputs.

    Outputs have the dtype of the first input.
    """
    present = {name: value for name, value in inputs.items() if value is not None}
    given = [present.get(name) for name in operator.operands(present)]
    assert given[0] is not None
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{operator.name}",
            given,
            attrs=dict(attributes),
            dtypes=[given[0].dtype] * len(shapes),
            shapes=[torch.Size(shape) for shape in shapes],
            version=VERSION,
        )
    )


def branch(
    condition: Tensor,
    yes: Callable[..., tuple[Tensor, ...]],
    no: Callable[..., tuple[Tensor, ...]],
    *args: Tensor,
    token: int = 0,
) -> tuple[Tensor, ...]:
    """`yes(*args)` or `no(*args)`: an `If` when exported, a plain branch otherwise.

    token: index in the call of the token that the condition refers to; for replacements of this function.
    """
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.cond import cond_op

        # torch.cond would run dynamo first, which doubles the time of tracing.
        result: tuple[Tensor, ...] = cond_op(condition, yes, no, args)
        return result
    return yes(*args) if bool(condition) else no(*args)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def scan(step: Step, carry: list[Tensor], xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """step(carry, x_i, i) over the leading dimension: a loop, or one `Scan` when exported.

    Returns the last carry and the stacked outputs. A `Scan` keeps the graph's size independent of the number of chunks.
    """
    count = xs[0].shape[0]
    if torch.compiler.is_exporting() and count > 1:
        from torch._higher_order_ops.scan import scan as scan_op

        def cloned(c: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            # scan_op rejects outputs that are views of inputs, and carries whose strides change.
            new, out = step(c, x, 0)
            return [_copy(t) for t in new], [_copy(t) for t in out]

        result: tuple[list[Tensor], list[Tensor]] = scan_op(cloned, [_copy(t) for t in carry], xs)
        return result
    outs = []
    for i in range(count):
        carry, out = step(carry, [x[i] for x in xs], i)
        outs.append(out)
    return carry, [torch.stack(column) for column in zip(*outs, strict=True)]
