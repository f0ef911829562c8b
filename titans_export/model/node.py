"""How a model calls the memory: the reference in eager mode, one `ai.titans::NeuralMemory` node when it is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layers import Step
from .memory import MemorySpec
from .operator import neural_memory_read, neural_memory_update

DOMAIN, OPERATOR, VERSION = "ai.titans", "NeuralMemory", 1
INPUTS = (
    "state",
    "q",
    "k",
    "v",
    "step_size",
    "momentum",
    "forget_gate",
    "fill",
    "learn",
    "valid",
    "slots",
    "update_limit",
    "norm_scale",
)
OUTPUTS = {"update": ("y", "state_out", "stats"), "read": ("y",)}


def attributes(spec: MemorySpec, mode: str, aligned: bool) -> dict[str, Any]:
    """The node's attributes, as docs/operator.md defines them."""
    return {
        "mode": mode,
        "schedule": "aligned" if aligned else "any",
        "widths": list(spec.widths),
        "activation": spec.activation,
        "residual": int(spec.residual),
        "layer_norm": int(spec.layer_norm),
        "chunk_size": spec.chunk_size,
    }


def _node(attrs: dict[str, Any], shapes: list[torch.Size], **inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Emits the node. Trailing absent inputs are left out, absent ones between become empty."""
    given = [inputs.get(name) for name in INPUTS]
    while given[-1] is None:
        given.pop()
    assert given[0] is not None
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{OPERATOR}",
            given,
            attrs=attrs,
            dtypes=[given[0].dtype] * len(shapes),
            shapes=shapes,
            version=VERSION,
        )
    )


def memory_update(
    spec: MemorySpec,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    step: Step,
    norm_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Updates and reads the memory; shapes as in `neural_memory_update`. Returns y and the packed rows."""
    fill = None if step.aligned else torch.remainder(step.position, spec.chunk_size)
    theta, eta, alpha = gates
    if torch.compiler.is_exporting():
        stats = torch.Size((*state.shape[:-1], 4))
        y, rows, _ = _node(
            attributes(spec, "update", step.aligned),
            [q.shape, state.shape, stats],
            state=state,
            q=q,
            k=k,
            v=v,
            step_size=theta,
            momentum=eta,
            forget_gate=alpha,
            fill=fill,
            learn=step.learn,
            norm_scale=norm_scale,
        )
        return y, rows
    result = neural_memory_update(
        spec, state, q, k, v, theta, eta, alpha, fill=fill, learn=step.learn, norm_scale=norm_scale
    )
    return result.y, result.state


def memory_read(spec: MemorySpec, state: Tensor, q: Tensor, norm_scale: Tensor | None = None) -> Tensor:
    """Reads the memory of the open chunk's start; shapes as in `neural_memory_read`."""
    if torch.compiler.is_exporting():
        return _node(attributes(spec, "read", False), [q.shape], state=state, q=q, norm_scale=norm_scale)[0]
    return neural_memory_read(spec, state, q, norm_scale=norm_scale)
