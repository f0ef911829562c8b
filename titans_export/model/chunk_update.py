"""The update of one chunk with gates per chunk: structure, packed row and equations (docs/chunk-operator.md).

The last of a chunk's C tokens triggers the update, with that token's gates:

    G = d/dWg sum over the chunk of theta_r scale ||M_Wg(k_r) - v_r||^2      at the gradient point Wg, by weight tensor
    U = -mu clamp(G)                                                         momentary surprise
    S = eta S + U                                                            accumulated surprise, equation 14
    W = (1 - alpha) W + orthogonalised S                                     equation 13

The gradient point moves to W every `batch_size` tokens, or never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_fields import RowField
from .fast_networks import NetworkSpec, Weights, pull
from .packed_row import Layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NORM_FLOOR = 1e-7


@dataclass(frozen=True)
class ChunkMemorySpec:
    """The structure of one head's memory and of its update.

    batch_size: tokens between moves of the gradient point, a multiple of chunk_size; 0: it stays at the initial
    weights.
    loss_scale: factor of the squared error.
    keys_per_token: u.
    lookahead: a key is stored with the next value; the chunk's last key is not stored.
    momentum_order: S^1 accumulates surprise, S^(m+1) accumulates S^m; 0: no momentum.
    combine: the update is a mix of "momenta", or of "surprise and momenta"; None: the momentum of the highest order.
    grad_clamp: maps the norm of each tensor's gradient smoothly into [clamp / 2, clamp]; 0: off.
    orthogonalise: Newton-Schulz steps on each matrix of the update.
    transition: the gradient point, and W with it, moves by this share of the distance only.
    """

    network: NetworkSpec
    chunk_size: int
    batch_size: int
    loss_scale: float
    keys_per_token: int = 1
    lookahead: bool = False
    momentum_order: int = 1
    combine: str | None = None
    grad_clamp: float = 0.0
    orthogonalise: int = 0
    transition: bool = False

    @property
    def fused(self) -> bool:
        """Whether the operator, and so a kernel, supports this memory. Otherwise it runs as standard operators."""
        simple = self.momentum_order <= 1 and self.combine is None and not self.transition
        return simple and self.network.kind == "mlp" and self.network.depth <= 3

    @property
    def keeps_point(self) -> bool:
        """Whether the row stores a gradient point: it differs from W, or moves by a share and needs W from before its
        chunk.
        """
        return self.batch_size != self.chunk_size or self.transition

    @property
    def period(self) -> int:
        """The period of `fill`, in tokens."""
        return self.batch_size if self.keeps_point and self.batch_size else self.chunk_size

    @property
    def rows(self) -> int:
        """Keys per chunk."""
        return self.chunk_size * self.keys_per_token

    def weight_count(self) -> int:
        return sum(int(torch.Size(shape).numel()) for shape in self.network.shapes.values())


def _names(spec: ChunkMemorySpec, letter: str) -> list[str]:
    """Names of the tensors of W, of the gradient point (G) or of an accumulated surprise (S, S2, ...)."""
    plain = letter.removesuffix("_")
    return [name.replace("W", letter, 1) if name[0] == "W" else f"{plain}_{name}" for name in spec.network.shapes]


def chunk_layout(spec: ChunkMemorySpec) -> Layout:
    """W | gradient point | S of each order | the open chunk's k, v and step sizes | padding."""
    shapes = spec.network.shapes
    fields = [RowField(name, shape, "weights") for name, shape in shapes.items()]
    kinds = [("G", "gradient_point")] if spec.keeps_point else []
    kinds += [(s, "higher_surprise" if order else "surprise") for order, s in enumerate(_surprise_letters(spec))]
    for letter, kind in kinds:
        fields += [
            RowField(name, shape, kind) for name, shape in zip(_names(spec, letter), shapes.values(), strict=True)
        ]
    rows, width = spec.rows, spec.network.width
    for name, shape in (("k", (rows, width)), ("v", (rows, width)), ("theta", (rows,))):
        fields.append(RowField(name, shape, "open_chunk"))
    return Layout.of(fields)


def _surprise_letters(spec: ChunkMemorySpec) -> list[str]:
    return ["S" if order == 0 else f"S{order + 1}_" for order in range(spec.momentum_order)]


class State(NamedTuple):
    """The tensors that a chunk update changes: W, the gradient point if it differs from W, and S of each order."""

    w: Weights
    point: Weights | None
    s: list[Weights]


def unpack_state(spec: ChunkMemorySpec, fields: dict[str, Tensor]) -> State:
    """Extracts the state from the fields of a packed row."""
    point = [fields[name] for name in _names(spec, "G")] if spec.keeps_point else None
    s = [[fields[name] for name in _names(spec, letter)] for letter in _surprise_letters(spec)]
    return State([fields[name] for name in spec.network.shapes], point, s)


def state_fields(spec: ChunkMemorySpec, state: State) -> dict[str, Tensor]:
    """The state as fields of a packed row."""
    fields = dict(zip(spec.network.shapes, state.w, strict=True))
    if state.point is not None:
        fields |= zip(_names(spec, "G"), state.point, strict=True)
    for letter, values in zip(_surprise_letters(spec), state.s, strict=True):
        fields |= zip(_names(spec, letter), values, strict=True)
    return fields


def flat_weights(weights: Weights, lead: int) -> Tensor:
    """Flattens weight tensors (*lead, *shape), with `lead` leading dimensions, to one (*lead, |W|)."""
    return torch.cat([w.flatten(lead) for w in weights], -1)


def _split(spec: ChunkMemorySpec, flat: Tensor) -> Weights:
    """Splits (..., |W|) into the weight tensors."""
    shapes = list(spec.network.shapes.values())
    parts = flat.split([int(torch.Size(shape).numel()) for shape in shapes], -1)
    return [part.reshape(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def initial_chunk_rows(spec: ChunkMemorySpec, weights: Weights) -> Tensor:
    """Packed rows (..., R) of a new memory with weights W (..., *shape), S = 0 and an empty chunk."""
    layout = chunk_layout(spec)
    lead = weights[0].shape[: weights[0].dim() - 2]
    like = weights[0]
    fields = {f.name: like.new_zeros(1).expand(*lead, *f.shape) for f in layout.fields}
    zeros = [[torch.zeros_like(w) for w in weights] for _ in range(spec.momentum_order)]
    fields |= state_fields(spec, State(weights, list(weights) if spec.keeps_point else None, zeros))
    return layout.pack(fields)


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix. x: (..., rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.transpose(-1, -2)
    x = x / (x * x).sum((-1, -2), keepdim=True).sqrt().clamp(min=NORM_FLOOR)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.transpose(-1, -2)


class Gates(NamedTuple):
    """Gates of a chunk, taken from its last token.

    momentum: (B, H, order). forget: (B, H). modulation: (B, H, tensors). combine: (B, H, terms). previous: (B, H, |W|),
    the previous layer's weights. previous_gate: (B, H). transition: ().
    """

    momentum: Tensor | None
    forget: Tensor
    modulation: Tensor | None = None
    combine: Tensor | None = None
    previous: Tensor | None = None
    previous_gate: Tensor | None = None
    transition: Tensor | None = None


def _per_tensor(gate: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B, H) to broadcast against (B, H, *shape)."""
    return gate.reshape(*gate.shape, *(1,) * (like.dim() - gate.dim()))


def _clamp(g: Tensor, limit: float) -> Tensor:
    dims = tuple(range(2, g.dim()))
    norm = (g * g).sum(dims, keepdim=True).sqrt()
    half = limit / 2
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    return g * ((torch.tanh(norm / half) * half + half) / safe)


def chunk_update(
    spec: ChunkMemorySpec, state: State, k: Tensor, v: Tensor, theta: Tensor, gates: Gates, moved: Tensor | None
) -> tuple[State, Tensor]:
    """The state after a complete chunk, and its losses (B, H, rows stored).

    k, v: (B, H, rows, D); theta: (B, H, rows). moved: (B,) bool, whether the gradient point moves after this chunk.
    """
    point = state.w if state.point is None else state.point
    if gates.previous is not None:
        assert gates.previous_gate is not None
        others = _split(spec, gates.previous)
        mix = gates.previous_gate
        point = [p + _per_tensor(mix, o) * o for p, o in zip(point, others, strict=True)]
    if spec.lookahead:
        k, v, theta = k[..., :-1, :], v[..., 1:, :], theta[..., :-1]
    prediction, back = pull(spec.network, point, k)
    error = prediction - v
    gradients = back((2 * spec.loss_scale) * theta.unsqueeze(-1) * error)
    w, s = [], [list(order) for order in state.s]
    for i, (old, g) in enumerate(zip(state.w, gradients, strict=True)):
        g = _clamp(g, spec.grad_clamp) if spec.grad_clamp else g
        update = -g if gates.modulation is None else -_per_tensor(gates.modulation[..., i], g) * g
        terms = [update]
        for order in range(spec.momentum_order):
            assert gates.momentum is not None
            update = _per_tensor(gates.momentum[..., order], g) * s[order][i] + update
            s[order][i] = update
            terms.append(update)
        if spec.combine:
            assert gates.combine is not None
            terms = terms if spec.combine == "surprise and momenta" else terms[1:]
            mixed = [_per_tensor(gates.combine[..., j], g) * term for j, term in enumerate(terms)]
            update = torch.stack(mixed).sum(0)
        if spec.orthogonalise and g.dim() == 4:
            update = orthogonalise(update, spec.orthogonalise)
        w.append(_per_tensor(1 - gates.forget, old) * old + update)
    following = state.point
    if following is not None and spec.batch_size:
        assert moved is not None
        target = w
        if spec.transition:
            assert gates.transition is not None
            share = gates.transition
            target = [p + share * (n - p) for p, n in zip(following, w, strict=True)]
            w = _where(moved, target, w)
        following = _where(moved, target, following)
    losses = spec.loss_scale * (error * error).sum(-1)
    return State(w, following, s), losses


def _where(condition: Tensor, yes: Weights, no: Weights) -> Weights:
    """Selects by stream. condition: (B,) bool."""
    return [torch.where(_per_tensor(condition, a), a, b) for a, b in zip(yes, no, strict=True)]


def pick(condition: Tensor, yes: State, no: State) -> State:
    """Selects by stream and head. condition: (B, H) bool."""
    point = None if yes.point is None or no.point is None else _where(condition, yes.point, no.point)
    s = [_where(condition, a, b) for a, b in zip(yes.s, no.s, strict=True)]
    return State(_where(condition, yes.w, no.w), point, s)


def chunk_weights(spec: ChunkMemorySpec, rows: Tensor) -> Tensor:
    """W of packed rows (B, H, R), flattened to (B, H, |W|)."""
    return flat_weights(unpack_state(spec, chunk_layout(spec).unpack(rows)).w, 2)
