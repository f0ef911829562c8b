"""How a model calls the memory: the reference in eager mode, one `ai.titans::NeuralMemory` node when it is exported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .chunk_neural_memory import ChunkInputs, ChunkUpdate, update_chunk_memory
from .chunk_update import ChunkMemorySpec
from .layers import Step
from .memory import MemorySpec
from .neural_memory import neural_memory_read, neural_memory_update

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
    "modulation",
    "previous",
    "previous_gate",
)
OUTPUTS = {"update": ("y", "state_out", "stats"), "read": ("y",)}
CHUNK_OUTPUTS = ("y", "state_out", "stats", "initial_weights")


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


def chunk_attributes(spec: ChunkMemorySpec, aligned: bool) -> dict[str, Any]:
    """The attributes of a node with one gate a chunk."""
    network = spec.network
    return {
        "mode": "update",
        "schedule": "aligned" if aligned else "any",
        "widths": [network.width, *((network.hidden,) * (network.depth - 1)), network.width],
        "activation": network.activation,
        "residual": int(network.residual),
        "layer_norm": int(network.norm),
        "chunk_size": spec.chunk_size,
        "gates": "chunk",
        "batch_size": spec.batch_size,
        "loss_scale": spec.loss_scale,
        "keys_per_token": spec.keys_per_token,
        "lookahead": int(spec.lookahead),
        "norm_weight": "fast" if network.norm else "slow",
        "momentum_order": spec.momentum_order,
        "grad_clamp": spec.grad_clamp,
        "orthogonalise": spec.orthogonalise,
    }


def memory_dtype_attributes(memory_dtype: str, rounding: str = "nearest", seed: int = 0) -> dict[str, Any]:
    """What a node with another memory_dtype has beside its other attributes; nothing for what is the default."""
    given = {"memory_dtype": memory_dtype, "rounding": rounding, "seed": seed}
    defaults = {"memory_dtype": "float32", "rounding": "nearest", "seed": 0}
    return {name: value for name, value in given.items() if value != defaults[name]}


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


def chunk_memory_update(
    spec: ChunkMemorySpec, x: ChunkInputs, position: Tensor, learn: Tensor | None, aligned: bool
) -> ChunkUpdate:
    """Updates and reads a memory with one gate a chunk; shapes as in `ChunkInputs`, whose fill and learn are made here.

    position: (B,) int64, rows consumed before the call; learn: (B,) bool, None for all.
    """
    counts = not aligned or spec.transition or spec.period != spec.chunk_size
    fill = torch.remainder(position, spec.period) if counts else None
    if torch.compiler.is_exporting() and spec.fused:
        lead, tokens = x.rows.shape[:2], x.q.shape[2]
        chunks = (tokens + spec.chunk_size - 1) // spec.chunk_size
        y, rows, stats, before = _node(
            chunk_attributes(spec, aligned),
            [x.q.shape, x.rows.shape, torch.Size((*lead, 4)), torch.Size((*lead, chunks, spec.weight_count()))],
            state=x.rows,
            q=x.q,
            k=x.k,
            v=x.v,
            step_size=x.step_size,
            momentum=None if x.momentum is None else x.momentum.squeeze(-1),
            forget_gate=x.forget,
            fill=fill,
            learn=learn,
            modulation=x.modulation,
            previous=x.previous,
            previous_gate=x.previous_gate,
        )
        return ChunkUpdate(y, rows, stats, before)
    learns = None if learn is None else learn.unsqueeze(-1).expand(-1, x.q.shape[2])
    return update_chunk_memory(spec, replace(x, fill=fill, learn=learns), aligned)
