"""Depthwise causal convolution with a state: the reference in eager mode, one `ai.titans::CausalConvolution` node when
exported. docs/convolution-operator.md defines the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import CAUSAL_CONVOLUTION
from . import exported
from .caches import cleared, inside, rows_of, write_streams


def causal_convolution_reference(
    past: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """The reference, computed in the dtype of the inputs."""
    length, taps = x.shape[1], weight.unbind(0)
    counts = inside(valid, length)
    rows = torch.cat([rows_of(past, slots), cleared(x, counts)], 1)
    if length == 1:
        y = (rows * weight).sum(1, keepdim=True)
    else:
        y = taps[0] * rows[:, :length]
        for i, tap in enumerate(taps[1:], start=1):
            y = y + tap * rows[:, i : i + length]
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    if valid is None:
        following = rows[:, length:]
    else:
        last = valid.unsqueeze(-1) + torch.arange(len(taps) - 1, device=x.device)
        following = rows.gather(1, last.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return cleared(y, counts), write_streams(past, slots, following)


def causal_convolution(
    past: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Returns y (B, T, C) and the next pool: the reference, or a node while exporting.

    past: (P, W - 1, C), each stream's last inputs, oldest first. x: (B, T, C). weight: (W, C), the last row for the
    newest input. bias: (C,). valid: (B,) int64, the rows that count; None for T. slots: (B,) int64, distinct, the row
    of each stream in the pool; None for 0..B-1, with P = B. activation: "none" or "silu", applied to y.
    """
    if not torch.compiler.is_exporting():
        return causal_convolution_reference(past, x, weight, bias, valid, slots, activation)
    inputs = {"past": past, "x": x, "weight": weight, "bias": bias, "valid": valid, "slots": slots}
    attributes = CAUSAL_CONVOLUTION.given({"activation": activation})
    y, following = exported.node(CAUSAL_CONVOLUTION, attributes, inputs, (x.shape, past.shape))
    return y, following


def reference(values: Mapping[str, Any], present: Collection[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of its inputs by name. `values` has all attributes."""
    return partial(causal_convolution_reference, activation=values["activation"])
