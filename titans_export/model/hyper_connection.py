"""Residual streams mixed by a hyper-connection: the reference in eager mode, one `ai.titans::HyperConnection` node when
it is exported. docs/hyper-connection.md defines the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import DOMAIN, VERSION

OPERATOR = "HyperConnection"
INPUTS = ("residuals", "projection", "bias", "branch", "weight")
OUTPUTS = ("input", "residuals_out", "beta")
ITERATIONS = 20
EPS = 1e-12

Mixed = tuple[Tensor, Tensor, Tensor | None]


def has_beta(streams: int, columns: int) -> bool:
    """Whether a projection of that many columns also gives beta."""
    return columns == streams + 2


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The transpose of exp(logits), (..., S, S), its columns and then its rows divided by their sums, so many times:
    nearly doubly stochastic.
    """
    # Softmax is the first division of columns.
    mix = _normalise_rows(torch.softmax(logits.transpose(-1, -2), -1))
    for _ in range(iterations - 1):
        mix = normalise(mix)
    return mix


def normalise(mix: Tensor) -> Tensor:
    """One more iteration on `sinkhorn`'s transpose."""
    # No column needs the floor: divided by its sum it had an entry of at least 1 / S, and no row's sum, by which that
    # was divided next, is above S.
    return _normalise_rows(mix / mix.sum(-1, keepdim=True))


def _normalise_rows(mix: Tensor) -> Tensor:
    return mix / mix.sum(-2, keepdim=True).clamp(min=EPS)


def hyper_connection_reference(
    residuals: Tensor,
    projection: Tensor,
    bias: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Mixed:
    """What a node computes, in the dtype of its inputs."""
    streams = residuals.shape[2]
    if branch is not None and weight is not None:
        residuals = residuals + weight.unsqueeze(-1) * branch.unsqueeze(2)
    # Dividing the products instead of the streams is the same in fewer divisions.
    norm = torch.linalg.vector_norm(residuals, dim=-1, keepdim=True).clamp(min=EPS)
    logits = residuals @ projection / norm + bias
    read = torch.sigmoid(logits[..., 0])
    mix = sinkhorn(logits[..., 1 : streams + 1], iterations)
    beta = 2 * torch.sigmoid(logits[..., -1]) if has_beta(streams, projection.shape[1]) else None
    return (read.unsqueeze(2) @ residuals).squeeze(2), mix @ residuals, beta


def hyper_connection(
    residuals: Tensor,
    projection: Tensor,
    bias: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Mixed:
    """The branch's input (B, T, D), the mixed streams (B, T, S, D) and, where the projection has S + 2 columns, beta
    (B, T, S), the weights of the branch's output. residuals: (B, T, S, D). projection: (D, S + 1 or S + 2). bias: (S,
    the same). branch, weight: the output (B, T, D) of the branch before and its beta; given together.
    """
    if not torch.compiler.is_exporting():
        return hyper_connection_reference(residuals, projection, bias, branch, weight, iterations)
    batch, tokens, streams, width = residuals.shape
    shapes = [torch.Size((batch, tokens, width)), residuals.shape]
    if has_beta(streams, projection.shape[1]):
        shapes.append(torch.Size((batch, tokens, streams)))
    given = [residuals, projection, bias]
    if branch is not None and weight is not None:
        given += [branch, weight]
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OPERATOR}",
        given,
        attrs={"iterations": iterations},
        dtypes=[residuals.dtype] * len(shapes),
        shapes=shapes,
        version=VERSION,
    )
    return outputs[0], outputs[1], outputs[2] if len(outputs) == len(OUTPUTS) else None
