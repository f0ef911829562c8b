"""ChunkNeuralMemory by its equations, with autograd for the gradient, and cases for tests.

Shares no code with the project but the names of attributes and inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from memory_dtype_oracle import Kept
from torch import Tensor

Node = dict[str, Any]
PER_TOKEN = ("momentum", "forget_gate", "modulation", "previous_gate")


def make_node(widths: tuple[int, ...] = (6, 10, 6), chunk_size: int = 4, **changes: Any) -> Node:
    """Attributes with schedule "any"; those left out are at their defaults."""
    node = {
        "schedule": "any",
        "widths": list(widths),
        "activation": "silu",
        "residual": 0,
        "layer_norm": 0,
        "chunk_size": chunk_size,
        "loss_scale": 1 / widths[0],
    }
    return node | changes


def option(node: Node, name: str) -> Any:
    """An attribute's value, or its default."""
    defaults = {
        "batch_size": node["chunk_size"],
        "loss_scale": 1.0,
        "keys_per_token": 1,
        "lookahead": 0,
        "norm_weight": "slow",
        "momentum_order": 1,
        "grad_clamp": 0.0,
        "orthogonalise": 0,
    }
    return node.get(name, defaults.get(name))


def weight_shapes(node: Node) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = list(pairwise(node["widths"]))
    return [*shapes, (node["widths"][0],)] if option(node, "norm_weight") == "fast" else shapes


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten() for w in weights])


def split(node: Node, values: Tensor) -> list[Tensor]:
    shapes = weight_shapes(node)
    parts = values.split([math.prod(shape) for shape in shapes], -1)
    return [part.reshape(*values.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def fields_of(node: Node) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a packed row's fields, flat over the tensors of W, G and S."""
    count = sum(math.prod(shape) for shape in weight_shapes(node))
    keys, width = node["chunk_size"] * option(node, "keys_per_token"), node["widths"][0]
    fields: list[tuple[str, tuple[int, ...]]] = [("W", (count,))]
    if option(node, "batch_size") != node["chunk_size"]:
        fields.append(("G", (count,)))
    if option(node, "momentum_order"):
        fields.append(("S", (count,)))
    return [*fields, ("k", (keys, width)), ("v", (keys, width)), ("theta", (keys,))]


def unpack(node: Node, rows: Tensor) -> dict[str, Tensor]:
    found, at = {}, 0
    for name, shape in fields_of(node):
        found[name] = rows[..., at : at + math.prod(shape)].reshape(*rows.shape[:-1], *shape)
        at += math.prod(shape)
    assert rows.shape[-1] == -(-at // 16) * 16
    return found


def fresh_rows(node: Node, weights: Tensor) -> Tensor:
    """Rows of a memory with these weights (..., |W|); what does not matter is NaN."""
    parts = []
    for name, shape in fields_of(node):
        value = {"W": weights, "G": weights, "S": torch.zeros_like(weights)}.get(name)
        parts.append(torch.full((*weights.shape[:-1], math.prod(shape)), math.nan) if value is None else value)
    rows = torch.cat([part.double() for part in parts], -1)
    return F.pad(rows, (0, -rows.shape[-1] % 16))


def network(node: Node, weights: list[Tensor], x: Tensor, norm_scale: Tensor | None) -> Tensor:
    act = {"silu": F.silu, "gelu": F.gelu}[node["activation"]]
    matrices = weights[: len(node["widths"]) - 1]
    h = x
    for i, w in enumerate(matrices):
        h = h @ w if i == 0 else act(h) @ w
    if node["layer_norm"]:
        scale = norm_scale if option(node, "norm_weight") == "slow" else weights[-1] + 1
        h = F.layer_norm(h, h.shape[-1:], eps=1e-5) * scale
    return x + h if node["residual"] else h


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


@dataclass
class Stream:
    """The results of one stream and head. y: (T, D). initial_weights: of each chunk, flat, as are the last W, G and S.

    loss, norm: of each chunk's update, None where it was dropped.
    """

    y: Tensor
    initial_weights: list[Tensor]
    w: Tensor
    g: Tensor
    s: Tensor
    loss: list[float | None]
    norm: list[float | None]


def run_stream(
    node: Node,
    inputs: dict[str, Tensor],
    weights: Tensor,
    learn: list[bool] | None = None,
    limit: float | None = None,
    kept: Kept | None = None,
) -> Stream:
    """Token by token from a fresh memory. inputs: the operator's, of one stream and head; `previous`: (chunks, |W|).
    kept: how the row holds W and S, None: exactly.
    """
    chunk, u = node["chunk_size"], option(node, "keys_per_token")
    batch, m = option(node, "batch_size"), option(node, "grad_clamp")
    norm_scale = inputs.get("norm_scale")
    w = split(node, weights)
    s = [torch.zeros_like(x) for x in w]
    if kept is not None:
        w, s = kept.fresh(w, s)
    g = w
    y: list[Tensor] = []
    initial_weights: list[Tensor] = []
    loss: list[float | None] = []
    norm: list[float | None] = []
    theta = inputs["step_size"].clone()
    for t in range(len(inputs["q"])):
        if learn is not None and not learn[t]:
            theta[t * u : (t + 1) * u] = 0
        if (t + 1) % chunk == 0:
            j = len(initial_weights)
            initial_weights.append(flat(w))
            if learn is not None and not learn[t]:
                loss.append(None)
                norm.append(None)
            else:
                keys = slice((t + 1 - chunk) * u, (t + 1) * u)
                k, v, step = inputs["k"][keys], inputs["v"][keys], theta[keys]
                if option(node, "lookahead"):
                    k, v, step = k[:-1], v[1:], step[:-1]
                point = w if batch == chunk else g
                if "previous" in inputs:
                    others = split(node, inputs["previous"][j])
                    point = [a + inputs["previous_gate"][t] * b for a, b in zip(point, others, strict=True)]
                leaves = [x.detach().clone().requires_grad_() for x in point]
                error = (network(node, leaves, k, norm_scale) - v).square().sum(-1) * node["loss_scale"]
                gradient = torch.autograd.grad((step * error).sum(), leaves)
                new_w, new_s = [], []
                old_w, old_s = (w, s) if kept is None else kept.begin(w, s)
                for p, (old, gp) in enumerate(zip(old_w, gradient, strict=True)):
                    n = gp.norm()
                    if m and n > 0:
                        gp = gp * (torch.tanh(n / (m / 2)) * m / 2 + m / 2) / n
                    mu = inputs["modulation"][t, p] if "modulation" in inputs else 1.0
                    update = -mu * gp
                    if option(node, "momentum_order"):
                        update = inputs["momentum"][t] * old_s[p] + update
                        new_s.append(update)
                    if option(node, "orthogonalise") and gp.dim() == 2:
                        update = newton_schulz(update, option(node, "orthogonalise"))
                    new_w.append((1 - inputs["forget_gate"][t]) * old + update)
                change = float((flat(new_w) - flat(old_w)).norm())
                loss.append(float(error.detach().sum()))
                norm.append(change)
                if limit is None or change <= limit:
                    w, s = new_w, new_s or s
                    if kept is not None:
                        w, s = kept.end(w, s)
                    if batch and (t + 1) % batch == 0:
                        g = w
        y.append(network(node, w, inputs["q"][t : t + 1], norm_scale)[0])
    return Stream(torch.stack(y), initial_weights, flat(w), flat(g), flat(s), loss, norm)


@dataclass(eq=False)
class ChunkCase:
    """Random inputs of (streams, heads) in float64 for a node."""

    node: Node
    length: int
    modulation: bool = False
    previous: bool = False
    streams: int = 2
    heads: int = 2
    seed: int = 0
    weights: Tensor = field(init=False)  # (B, H, |W|)
    inputs: dict[str, Tensor] = field(init=False)  # (B, H, ...) of the whole length, `previous` (B, H, chunks, |W|)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        node, lead, d = self.node, (self.streams, self.heads), self.node["widths"][0]
        keys = self.length * option(node, "keys_per_token")

        def normal(*shape: int) -> Tensor:
            # Values that float32 holds: the kernel and the oracle start from the same numbers.
            return torch.randn(*lead, *shape, generator=draw, dtype=torch.float64).float().double()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*lead, *shape, generator=draw, dtype=torch.float64).float().double()

        def draw_weights(*lead: int) -> Tensor:
            parts = [
                normal(*lead, math.prod(shape)) * (shape[0] ** -0.5 if len(shape) == 2 else 0.3)
                for shape in weight_shapes(node)
            ]
            return torch.cat(parts, -1).float().double()

        self.weights = draw_weights()
        self.inputs = {
            "q": F.normalize(normal(self.length, d), dim=-1).float().double(),
            "k": F.normalize(normal(keys, d), dim=-1).float().double(),
            "v": normal(keys, d),
            "step_size": uniform(keys) * (0.1 if node["layer_norm"] else 0.5),
            "forget_gate": 0.3 * uniform(self.length),
        }
        if option(node, "momentum_order"):
            self.inputs["momentum"] = uniform(self.length)
        if self.modulation:
            self.inputs["modulation"] = uniform(self.length, len(weight_shapes(node)))
        if self.previous:
            self.inputs["previous"] = 0.5 * draw_weights(self.length // node["chunk_size"])
            self.inputs["previous_gate"] = uniform(self.length)
        self.inputs = {name: value.float().double() for name, value in self.inputs.items()}
        if node["layer_norm"] and option(node, "norm_weight") == "slow":
            self.norm_scale = (1 + 0.3 * normal(d)[0]).float().double()
        else:
            self.norm_scale = None

    @property
    def period(self) -> int:
        """What `fill` counts up to."""
        batch: int = option(self.node, "batch_size")
        return batch or int(self.node["chunk_size"])

    def rows(self) -> Tensor:
        return fresh_rows(self.node, self.weights)

    def call(self, begin: int, end: int, aligned: bool = False) -> dict[str, Tensor]:
        """Tokens [begin, end) of every stream as one call."""
        chunk, u = self.node["chunk_size"], option(self.node, "keys_per_token")
        call = {}
        for name, value in self.inputs.items():
            if name == "previous":
                # Slots of chunks that this call does not complete hold anything.
                padded = torch.full((*value.shape[:2], -(-(end - begin) // chunk), value.shape[3]), math.nan).double()
                first, last = begin // chunk, end // chunk
                padded[:, :, : last - first] = value[:, :, first:last]
                call[name] = padded
            else:
                by = u if name in ("k", "v", "step_size") else 1
                call[name] = value[:, :, begin * by : end * by]
        if not aligned or self.period not in (0, chunk):
            call["fill"] = torch.full((self.streams,), begin % self.period)
        if self.norm_scale is not None:
            call["norm_scale"] = self.norm_scale
        return call

    def calls(self, cuts: list[int]) -> list[dict[str, Tensor]]:
        ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
        return [self.call(end - cut, end) for cut, end in zip(cuts, ends, strict=True)]

    def stream(
        self, b: int, h: int, dtype: torch.dtype = torch.float64, jitter: int | None = None, **how: Any
    ) -> Stream:
        """The oracle's. jitter: seed of the signs of 2^-24, by which each initial weight is off."""
        inputs = {name: value[b, h].to(dtype) for name, value in self.inputs.items()}
        if self.norm_scale is not None:
            inputs["norm_scale"] = self.norm_scale[h].to(dtype)
        weights = self.weights[b, h]
        if jitter is not None:
            draw = torch.Generator().manual_seed(jitter)
            weights = weights * (1 + 2.0**-24 * (2 * torch.randint(2, weights.shape, generator=draw) - 1))
        return run_stream(self.node, inputs, weights.to(dtype), **how)
