"""Oracles that share no code with the project: the paper's equations with autograd for the inner gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_export.model.memory import MemorySpec


def network(spec: MemorySpec, weights: list[Tensor], x: Tensor, norm_scale: Tensor | None) -> Tensor:
    """M_W(x) of one head. weights: (in, out) each; x: (T, D); norm_scale: (D,) or None."""
    act = {"silu": F.silu, "gelu": F.gelu}[spec.activation]
    h = x
    for i, w in enumerate(weights):
        h = h @ w if i == 0 else act(h) @ w
    if spec.layer_norm:
        assert norm_scale is not None
        h = F.layer_norm(h, h.shape[-1:], weight=norm_scale, eps=1e-5)
    return x + h if spec.residual else h


def titans_stream(
    spec: MemorySpec,
    w0: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    momentum: Tensor,
    forget_gate: Tensor,
    learn: list[bool] | None = None,
    norm_scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Equations 12 to 15 of one stream and head, token by token, with torch.autograd for the gradient of the loss.

    q, k, v: (T, D); gates: (T,). Returns y (T, D), W, S and the losses (T,).
    """
    w, s = [x.clone() for x in w0], [torch.zeros_like(x) for x in w0]
    out, losses, origin = [], [], w
    for t in range(len(q)):
        if t % spec.chunk_size == 0:
            origin = [x.detach().clone() for x in w]
        if learn is None or learn[t]:
            leaves = [x.clone().requires_grad_() for x in origin]
            loss = (network(spec, leaves, k[t : t + 1], norm_scale) - v[t : t + 1]).square().sum()
            gradient = torch.autograd.grad(loss, leaves)
            s = [momentum[t] * a - step_size[t] * g for a, g in zip(s, gradient, strict=True)]
            w = [(1 - forget_gate[t]) * a + b for a, b in zip(w, s, strict=True)]
            losses.append(loss.detach())
        else:
            losses.append(torch.zeros((), dtype=q.dtype))
        out.append(network(spec, w, q[t : t + 1], norm_scale)[0])
    return torch.stack(out), w, s, torch.stack(losses)
