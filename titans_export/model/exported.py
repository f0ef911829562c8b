"""Helpers that emit one ONNX construct each: an operator's node, an `If`, a `Scan`, a call of a repeated part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import DOMAIN, VERSION, Operator

Step = Callable[[list[Tensor], list[Tensor], int], tuple[list[Tensor], list[Tensor]]]
Run = Callable[..., tuple[Tensor, ...]]
PARTS_DOMAIN = "ai.titans.parts"  # of nodes that stand for repeated parts while a graph is traced


@dataclass(frozen=True)
class Part:
    """A part of a model that is traced once for all its calls, such as a layer.

    module: the module of the first call. run: computes run(module, *inputs). inputs: shape and dtype of each. tensors:
    names of the module's parameters and buffers, which follow the inputs in a node. outputs: their number.
    """

    name: str
    module: nn.Module
    run: Run
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    tensors: tuple[str, ...]
    outputs: int


_parts: ContextVar[dict[Any, Part] | None] = ContextVar("parts", default=None)


@contextmanager
def collected_parts() -> Iterator[dict[Any, Part]]:
    """A context in which tracing emits a node for each call of `repeated`. Yields the distinct parts."""
    parts: dict[Any, Part] = {}
    token = _parts.set(parts)
    try:
        yield parts
    finally:
        _parts.reset(token)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def repeated(
    kind: str, module: nn.Module, run: Run, inputs: Sequence[Tensor], shapes: Sequence[torch.Size]
) -> tuple[Tensor, ...]:
    """run(module, *inputs); a single node while a graph is traced in a context of `collected_parts`.

    Calls with equal kinds and equal shapes must differ in the values of tensors only. The time of tracing then does not
    depend on the number of calls. shapes: those of the outputs, which have the dtype of the first input.
    """
    # First, as torch.compile cannot trace a ContextVar.
    if not torch.compiler.is_exporting() or (parts := _parts.get()) is None:
        return run(module, *inputs)
    tensors = tensors_of(module)
    given = tuple((x.shape, x.dtype) for x in inputs)
    key = (kind, given, tuple((name, x.shape, x.dtype) for name, x in tensors.items()))
    if key not in parts:
        parts[key] = Part(f"{kind}_{len(parts)}", module, run, given, tuple(tensors), len(shapes))
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{PARTS_DOMAIN}::{parts[key].name}",
            [*inputs, *tensors.values()],
            dtypes=[inputs[0].dtype] * len(shapes),
            shapes=list(shapes),
            version=1,
        )
    )


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
        from torch._dynamo import config as dynamo
        from torch._higher_order_ops.scan import scan as scan_op

        def cloned(c: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            # scan_op rejects outputs that are views of inputs, and carries whose strides change.
            new, out = step(c, x, 0)
            return [_copy(t) for t in new], [_copy(t) for t in out]

        # torch.export makes every size of the step symbolic. Equal sizes then compare as unequal now and then.
        with dynamo.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
            result: tuple[list[Tensor], list[Tensor]] = scan_op(cloned, [_copy(t) for t in carry], xs)
        return result
    outs = []
    for i in range(count):
        carry, out = step(carry, [x[i] for x in xs], i)
        outs.append(out)
    return carry, [torch.stack(column) for column in zip(*outs, strict=True)]
