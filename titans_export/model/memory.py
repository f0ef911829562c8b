"""The neural long-term memory: the equations of Titans (arXiv 2501.00663, sections 3.1 and 3.2).

Rows are tokens and y = x W. A memory is a network M_W of depth 1 (a linear map) to 3, whose weights W are trained while
the model runs. With k, v, q of token t, the step size theta_t, the momentum eta_t and the forget gate alpha_t:

    l_t = || M_W0(k_t) - v_t ||^2                     loss                                 (12)
    g_t = dl_t / dW at W0                             momentary surprise                   (8), (18)
    S_t = eta_t S_{t-1} - theta_t g_t                 accumulated surprise                 (10), (14), (18)
    W_t = (1 - alpha_t) W_{t-1} + S_t                 update with forgetting               (13)
    y_t = M_{W_t}(q_t)                                retrieval                            (15)

W0 are the weights at the start of the token's chunk: all tokens of a chunk share this gradient point (16). Three forms
compute the same function. `recurrence` goes token by token. `chunk_update` computes a whole chunk with matmuls.
`CachedChunk` takes one token at a time and leaves W and S unchanged until the chunk is full. A token that is not
`active` (frozen memory, padding) leaves W and S unchanged.

Shapes: weights are lists with one tensor (..., in, out) per layer; tokens (..., T, D); gates and `active` (..., T). The
leading dimensions are equal or broadcastable, such as (streams, heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu")
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class MemorySpec:
    """The structure of one head's memory network.

    widths: layer widths from input to output, such as (64, 64) for a linear map or (64, 256, 64) for an MLP of depth 2.
    activation: between layers, "silu" or "gelu" (exact, with erf).
    residual: M(x) = x + f(x) instead of f(x).
    layer_norm: applies a LayerNorm to f's output. Its scale is an argument of each call and does not learn at
    inference.
    chunk_size: tokens that share one gradient point.
    """

    widths: tuple[int, ...]
    activation: str = "silu"
    residual: bool = False
    layer_norm: bool = False
    chunk_size: int = 64

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        return list(zip(self.widths[:-1], self.widths[1:], strict=True))

    @property
    def weights(self) -> int:
        """Number of fast weights per head."""
        return sum(i * o for i, o in self.shapes)


def _act(spec: MemorySpec, z: Tensor) -> Tensor:
    return F.silu(z) if spec.activation == "silu" else F.gelu(z)


def _act_derivative(spec: MemorySpec, z: Tensor) -> Tensor:
    if spec.activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    return cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327


def _normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without scale: the normalised rows and the reciprocal standard deviation."""
    centred = z - z.mean(-1, keepdim=True)
    reciprocal = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * reciprocal, reciprocal


def _finish(spec: MemorySpec, f: Tensor, x: Tensor, norm_scale: Tensor | None) -> Tensor:
    """M(x) from f(x): applies the LayerNorm and the residual."""
    if spec.layer_norm:
        assert norm_scale is not None
        f = _normalise(f)[0] * norm_scale.unsqueeze(-2)
    return x + f if spec.residual else f


def read(spec: MemorySpec, weights: Sequence[Tensor], q: Tensor, norm_scale: Tensor | None = None) -> Tensor:
    """Retrieval y = M_W(q), equation 15, with fixed weights. norm_scale: (..., D) with layer_norm, else None."""
    h = q
    for i, w in enumerate(weights):
        h = h @ w
        if i < spec.depth - 1:
            h = _act(spec, h)
    return _finish(spec, h, q, norm_scale)


class Surprise(NamedTuple):
    """The momentary surprise of every token in factored form: g of layer i is layer_input[i]^T output_grad[i]."""

    layer_input: list[Tensor]  # (..., T, in): the layer's input at W0
    output_grad: list[Tensor]  # (..., T, out): the loss's gradient at the layer's output
    loss: Tensor  # (..., T)


def surprise(
    spec: MemorySpec, weights: Sequence[Tensor], k: Tensor, v: Tensor, norm_scale: Tensor | None = None
) -> Surprise:
    """Momentary surprise, the gradient of equation 12, by the analytic backward pass at fixed weights."""
    left, pre = [k], []
    for i, w in enumerate(weights):
        z = left[-1] @ w
        if i < spec.depth - 1:
            pre.append(z)
            left.append(_act(spec, z))
    error = _finish(spec, z, k, norm_scale) - v
    d = 2 * error
    if spec.layer_norm:
        assert norm_scale is not None
        unit, reciprocal = _normalise(z)
        d = d * norm_scale.unsqueeze(-2)
        d = reciprocal * (d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True))
    right = [d]
    for w, z in zip(reversed(weights[1:]), reversed(pre), strict=True):
        right.insert(0, (right[0] @ w.transpose(-1, -2)) * _act_derivative(spec, z))
    return Surprise(left, right, (error * error).sum(-1))


class Gates(NamedTuple):
    """Per token: step size theta, momentum eta and forget gate alpha, each (..., T).

    active: (..., T), 1 or 0 in the gates' dtype, or None for all 1.
    """

    step_size: Tensor
    momentum: Tensor
    forget: Tensor
    active: Tensor | None = None

    def masked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta, eta, 1 - alpha and the mask. An inactive token becomes the identity on W and S."""
        keep = 1 - self.forget
        if self.active is None:
            return self.step_size, self.momentum, keep, torch.ones_like(keep)
        on = self.active.expand_as(keep)
        one = torch.ones_like(keep)
        return self.step_size * on, torch.where(on > 0, self.momentum, one), torch.where(on > 0, keep, one), on

    def chunks(self, size: int) -> list[Gates]:
        parts = (g.split(size, -1) if g is not None else None for g in self)
        theta, eta, alpha, active = parts
        assert theta is not None and eta is not None and alpha is not None
        count = len(theta)
        return [Gates(*row) for row in zip(theta, eta, alpha, active or [None] * count, strict=True)]


class State(NamedTuple):
    """Fast weights W and accumulated surprise S of one memory, each a list with one tensor (..., in, out) per layer."""

    w: list[Tensor]
    s: list[Tensor]


def recurrence(
    spec: MemorySpec,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    norm_scale: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The equations token by token, with W and S updated on every token. This form defines the others."""
    (w, s), origin, out = state, state.w, []
    theta, eta, keep, on = gates.masked()
    for t in range(q.shape[-2]):
        if t % spec.chunk_size == 0:
            origin = w
        g = surprise(spec, origin, k[..., t : t + 1, :], v[..., t : t + 1, :], norm_scale)

        def at(gate: Tensor, t: int = t) -> Tensor:
            return gate[..., t, None, None]

        s = [
            at(eta) * s_i - at(theta) * (left.transpose(-1, -2) @ right)
            for s_i, left, right in zip(s, g.layer_input, g.output_grad, strict=True)
        ]
        w = [at(keep) * w_i + at(on) * s_i for w_i, s_i in zip(w, s, strict=True)]
        out.append(read(spec, w, q[..., t : t + 1, :], norm_scale))
    return torch.cat(out, -2), State(w, s)


class Coefficients(NamedTuple):
    """Coefficients of W_t and S_t in terms of the chunk's initial state and its surprises:

        S_t = m_t S_0 - sum_s e[t, s] g_s        W_t = beta_t W_0 + f_t S_0 - sum_s a[t, s] g_s

    The sums run over the tokens s <= t of the chunk.
    """

    a: Tensor  # (..., C, C) lower triangular
    e: Tensor  # (..., C, C) lower triangular
    m: Tensor  # (..., C)
    f: Tensor  # (..., C)
    beta: Tensor  # (..., C)


def _running_products(factors: Tensor) -> Tensor:
    """(..., C) to (..., C, C): entry [t, s] is the product of factors over (s, t], 1 on the diagonal, 0 above it.

    Uses doubling and multiplications only, so it is exact for factors of 0, unlike ratios of cumulative products.
    """
    size = factors.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=factors.device).tril(-1)
    product = torch.where(below, factors.unsqueeze(-1), torch.ones_like(factors).unsqueeze(-1))
    reach = 1
    while reach < size:
        product = torch.cat([product[..., :reach, :], product[..., reach:, :] * product[..., :-reach, :]], -2)
        reach *= 2
    return product.tril()


def coefficients(gates: Gates) -> Coefficients:
    """The coefficients of whole chunks; gates have shape (..., C)."""
    theta, eta, keep, on = gates.masked()
    e, kept = _running_products(eta), _running_products(keep)
    b = kept * on.unsqueeze(-2)
    # The first column holds products over tokens 1..t; token 0's own factor completes the product.
    m = e[..., :, 0] * eta[..., :1]
    beta = kept[..., :, 0] * keep[..., :1]
    theta = theta.unsqueeze(-2)
    return Coefficients((b @ e) * theta, e * theta, m, (b @ m.unsqueeze(-1)).squeeze(-1), beta)


def chunk_update(
    spec: MemorySpec,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Coefficients,
    norm_scale: Tensor | None = None,
) -> tuple[Tensor, State, Tensor]:
    """One chunk with matmuls. Returns retrievals (..., C, D), the state after the chunk, and losses (..., C)."""
    g = surprise(spec, state.w, k, v, norm_scale)
    beta, f = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)
    last_a, last_e = c.a[..., -1, :, None], c.e[..., -1, :, None]
    last_beta, last_f, last_m = (x[..., -1, None, None] for x in (c.beta, c.f, c.m))
    h, w_next, s_next = q, [], []
    for i, (w, s, left, right) in enumerate(zip(state.w, state.s, g.layer_input, g.output_grad, strict=True)):
        z = beta * (h @ w) + f * (h @ s) - (c.a * (h @ left.transpose(-1, -2))) @ right
        h = _act(spec, z) if i < spec.depth - 1 else z
        left_t = left.transpose(-1, -2)
        w_next.append(last_beta * w + last_f * s - left_t @ (last_a * right))
        s_next.append(last_m * s - left_t @ (last_e * right))
    return _finish(spec, h, q, norm_scale), State(w_next, s_next), g.loss


def chunked(
    spec: MemorySpec,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    norm_scale: Tensor | None = None,
) -> tuple[Tensor, State, Tensor]:
    """Processes T >= 1 tokens in chunks; the last chunk may be shorter. Returns as `chunk_update`, for all T tokens."""
    size = spec.chunk_size
    out, losses = [], []
    # split, because the backward pass of indexing fills a zero tensor of full size for every chunk.
    for q_c, k_c, v_c, g_c in zip(
        q.split(size, -2), k.split(size, -2), v.split(size, -2), gates.chunks(size), strict=True
    ):
        y, state, loss = chunk_update(spec, state, q_c, k_c, v_c, coefficients(g_c), norm_scale)
        out.append(y)
        losses.append(loss)
    return torch.cat(out, -2), state, torch.cat(losses, -1)


@dataclass
class CachedChunk:
    """The open chunk of cached decoding: surprises so far in factored form, and their coefficients at the last token.

    layer_input, output_grad: per layer (..., C, in) and (..., C, out); rows after the last token are zero or unused. e,
    a: (..., C), the rows e[t, :] and a[t, :] of `Coefficients`; m, f, beta: (...).
    """

    layer_input: list[Tensor]
    output_grad: list[Tensor]
    e: Tensor
    a: Tensor
    m: Tensor
    f: Tensor
    beta: Tensor

    def append(self, at: Tensor, g: Surprise, theta: Tensor, eta: Tensor, keep: Tensor, on: Tensor) -> CachedChunk:
        """Appends one token. at: (..., C) bool, True at the token's row; gates: (...), from `Gates.masked`."""
        row = at.unsqueeze(-1)
        left = [torch.where(row, new, old) for new, old in zip(g.layer_input, self.layer_input, strict=True)]
        right = [torch.where(row, new, old) for new, old in zip(g.output_grad, self.output_grad, strict=True)]
        e = torch.where(at, theta.unsqueeze(-1), eta.unsqueeze(-1) * self.e)
        a = keep.unsqueeze(-1) * self.a + on.unsqueeze(-1) * e
        m = eta * self.m
        return CachedChunk(left, right, e, a, m, keep * self.f + on * m, keep * self.beta)

    def read(self, spec: MemorySpec, state: State, q: Tensor, norm_scale: Tensor | None = None) -> Tensor:
        """y = M_{W_t}(q), without forming W_t. It computes beta W minus the cached surprises. q: (..., 1, D)."""
        beta, f, a = self.beta[..., None, None], self.f[..., None, None], self.a.unsqueeze(-2)
        h = q
        for i, (w, s) in enumerate(zip(state.w, state.s, strict=True)):
            z = beta * (h @ w) + f * (h @ s) - (a * (h @ self.layer_input[i].transpose(-1, -2))) @ self.output_grad[i]
            h = _act(spec, z) if i < spec.depth - 1 else z
        return _finish(spec, h, q, norm_scale)

    def update(self, state: State) -> State:
        """W and S after the cached tokens: the initial state of the next chunk."""
        beta, f, m = (x[..., None, None] for x in (self.beta, self.f, self.m))
        left_t = [x.transpose(-1, -2) for x in self.layer_input]
        w = [
            beta * w + f * s - x @ (self.a.unsqueeze(-1) * d)
            for w, s, x, d in zip(state.w, state.s, left_t, self.output_grad, strict=True)
        ]
        s = [m * s - x @ (self.e.unsqueeze(-1) * d) for s, x, d in zip(state.s, left_t, self.output_grad, strict=True)]
        return State(w, s)
