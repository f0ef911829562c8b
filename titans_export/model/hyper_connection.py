"""Residual streams mixed by a hyper-connection: the reference in eager mode, one `ai.titans::HyperConnection` node when
exported. docs/hyper-connection.md defines the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import DOMAIN, HYPER_CONNECTION, VERSION

ITERATIONS: int = HYPER_CONNECTION.defaults["iterations"]
EPS = 1e-12

Mixed = tuple[Tensor, Tensor, Tensor | None]


def has_beta(streams: int, columns: int) -> bool:
    """Whether a projection with this many columns also yields beta."""
    return columns == streams + 2


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The transpose of exp(logits), (..., S, S), made nearly doubly stochastic. Each iteration divides columns, then
    rows, by their sums.
    """
    # The softmax is the first division by column sums.
    mix = _normalise_rows(torch.softmax(logits.transpose(-1, -2), -1))
    for _ in range(iterations - 1):
        mix = normalise(mix)
    return mix


def normalise(mix: Tensor) -> Tensor:
    """One more iteration on the transpose that `sinkhorn` returns."""
    # Column sums need no floor: each column has an entry of at least 1 / S after its division, and the row sums that
    # divide it next are at most S.
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
    """The reference, computed in the dtype of the inputs."""
    streams = residuals.shape[2]
    if branch is not None and weight is not None:
        residuals = residuals + weight.unsqueeze(-1) * branch.unsqueeze(2)
    # Dividing the matmuls instead of the streams gives the same result with fewer divisions.
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
    """Returns the branch's input (B, T, D), the mixed streams (B, T, S, D), and beta (B, T, S), the weights of the
    branch's output, or None. Only a projection with S + 2 columns yields beta.

    residuals: (B, T, S, D). projection: (D, S + 1 or S + 2). bias: (S, S + 1 or S + 2). branch, weight: the previous
    branch's output (B, T, D) and its beta; both or neither.
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
        f"{DOMAIN}::{HYPER_CONNECTION.name}",
        given,
        attrs=HYPER_CONNECTION.complete({"iterations": iterations}),
        dtypes=[residuals.dtype] * len(shapes),
        shapes=shapes,
        version=VERSION,
    )
    return outputs[0], outputs[1], outputs[2] if len(outputs) == len(HYPER_CONNECTION.outputs) else None
