"""Memory networks with fast weights: the forward pass and the gradient of every weight, derived by hand.

A network is a list of weight tensors, each (..., *shape), applied to rows (..., R, D). The leading dimensions are
arbitrary, such as (streams, heads). `pull` returns M(x) and a function from dL/dM(x) to the gradients of all weights.
The gradients equal those of autograd, but use standard operators that any exporter accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import LAYER_NORM_EPS

Weights = list[Tensor]
Pull = tuple[Tensor, Callable[[Tensor], Weights]]
_Block = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Weights]]]

KINDS = ("mlp", "gated-residual", "factorized", "swiglu")


@dataclass(frozen=True)
class NetworkSpec:
    """kind: one of `KINDS`.
    width: D of its rows.
    hidden: inner width, or the rank of "factorized".
    depth: number of layers or blocks.
    activation: of the MLP.
    residual: M(x) = x + f(x).
    norm: applies a LayerNorm with scale gamma + 1 to f's output; gamma is a fast weight.
    """

    kind: str
    width: int
    depth: int
    hidden: int
    activation: str = "gelu"
    residual: bool = True
    norm: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weight tensors in order, gammas last."""
        d, h = self.width, self.hidden
        blocks: list[tuple[int, ...]] = []
        if self.kind == "mlp":
            widths = (d, *((h,) * (self.depth - 1)), d)
            blocks += [(widths[i], widths[i + 1]) for i in range(self.depth)]
        elif self.kind == "gated-residual":
            blocks += [(d, h), (h, d), (2 * d, d)] * self.depth + [(d, d)]
        elif self.kind == "factorized":
            blocks += [(d, h), (h, d)] * self.depth
        elif self.kind == "swiglu":
            blocks += [(d, 2 * h), (h, d)] * self.depth
        shapes: dict[str, tuple[int, ...]] = {f"W{i}": shape for i, shape in enumerate(blocks)}
        if self.kind == "swiglu":
            shapes["inner_gamma"] = (d,)
        if self.norm:
            shapes["gamma"] = (d,)
        return shapes


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    return cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_Function = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "gelu": (F.gelu, _gelu_derivative),
    "silu": (F.silu, _silu_derivative),
}


def _mlp(spec: NetworkSpec, weights: Weights, x: Tensor) -> _Block:
    act, derivative = _ACTIVATIONS[spec.activation]
    rows, pre = [x], []
    for i, w in enumerate(weights):
        z = rows[-1] @ w
        if i + 1 < len(weights):
            pre.append(z)
            rows.append(act(z))

    def back(dz: Tensor) -> tuple[Tensor, Weights]:
        grads: Weights = []
        for i in range(len(weights) - 1, -1, -1):
            grads.insert(0, _transposed(rows[i]) @ dz)
            dz = dz @ _transposed(weights[i])
            if i:
                dz = dz * derivative(pre[i - 1])
        return dz, grads

    return z, back


def _gated_residual(weights: Weights, x: Tensor) -> _Block:
    """One block: x + sigmoid([y, x] Wg) (y - x), y = gelu(x W1) W2."""
    w1, w2, wg = weights
    top, bottom = wg.split(x.shape[-1], -2)
    pre = x @ w1
    hidden = F.gelu(pre)
    y = hidden @ w2
    both = torch.cat([y, x], -1)
    gate = torch.sigmoid(both @ wg)

    def back(d: Tensor) -> tuple[Tensor, Weights]:
        d_gate = d * (y - x) * gate * (1 - gate)
        d_y = d * gate + d_gate @ _transposed(top)
        d_pre = (d_y @ _transposed(w2)) * _gelu_derivative(pre)
        d_x = d * (1 - gate) + d_gate @ _transposed(bottom) + d_pre @ _transposed(w1)
        return d_x, [_transposed(x) @ d_pre, _transposed(hidden) @ d_y, _transposed(both) @ d_gate]

    return x + gate * (y - x), back


def _linear(weights: Weights, x: Tensor) -> _Block:
    (w,) = weights
    return x @ w, lambda d: (d @ _transposed(w), [_transposed(x) @ d])


def _factorized(weights: Weights, x: Tensor, first: bool) -> _Block:
    w1, w2 = weights
    a = x if first else F.gelu(x)
    inner = a @ w1

    def back(d: Tensor) -> tuple[Tensor, Weights]:
        d_inner = d @ _transposed(w2)
        d_x = d_inner @ _transposed(w1)
        return (d_x if first else d_x * _gelu_derivative(x)), [_transposed(a) @ d_inner, _transposed(inner) @ d]

    return inner @ w2, back


def _swiglu(weights: Weights, x: Tensor) -> _Block:
    """One block: x + (a gelu(g)) W2, [a, g] = x W1."""
    w1, w2 = weights
    a, gate = (x @ w1).chunk(2, -1)
    bent = F.gelu(gate)
    inner = a * bent

    def back(d: Tensor) -> tuple[Tensor, Weights]:
        d_inner = d @ _transposed(w2)
        d_both = torch.cat([d_inner * bent, d_inner * a * _gelu_derivative(gate)], -1)
        return d + d_both @ _transposed(w1), [_transposed(x) @ d_both, _transposed(inner) @ d]

    return x + inner @ w2, back


def _norm(gamma: Tensor, x: Tensor) -> _Block:
    """LayerNorm without shift, with scale gamma + 1."""
    centred = x - x.mean(-1, keepdim=True)
    reciprocal = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
    unit, scale = centred * reciprocal, (gamma + 1).unsqueeze(-2)

    def back(d: Tensor) -> tuple[Tensor, Weights]:
        d_unit = d * scale
        d_x = reciprocal * (d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True))
        return d_x, [(d * unit).sum(-2)]

    return unit * scale, back


def pull(spec: NetworkSpec, weights: Weights, x: Tensor) -> Pull:
    """M(x), (..., R, D), and the function from dL/dM(x) to dL/dweight in the order of `spec.shapes`."""
    matrices = weights[: len(spec.shapes) - spec.norm - (spec.kind == "swiglu")]
    blocks = []
    if spec.kind == "mlp":
        blocks.append(_mlp(spec, matrices, x))
    elif spec.kind == "gated-residual":
        for i in range(spec.depth):
            blocks.append(_gated_residual(matrices[3 * i : 3 * i + 3], blocks[-1][0] if blocks else x))
        blocks.append(_linear(matrices[-1:], blocks[-1][0]))
    elif spec.kind == "factorized":
        for i in range(spec.depth):
            blocks.append(_factorized(matrices[2 * i : 2 * i + 2], blocks[-1][0] if blocks else x, first=i == 0))
    else:
        for i in range(spec.depth):
            blocks.append(_swiglu(matrices[2 * i : 2 * i + 2], blocks[-1][0] if blocks else x))
        blocks.append(_norm(weights[len(matrices)], blocks[-1][0]))
    if spec.norm:
        blocks.append(_norm(weights[-1], blocks[-1][0]))
    y = blocks[-1][0]

    def back(d: Tensor) -> Weights:
        grads: Weights = []
        for _, step in reversed(blocks):
            d, own = step(d)
            grads = own + grads
        return grads

    return (x + y if spec.residual else y), back


def forward(spec: NetworkSpec, weights: Weights, x: Tensor) -> Tensor:
    """M(x), (..., R, D)."""
    return pull(spec, weights, x)[0]
