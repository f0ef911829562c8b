"""The memory layer: reads use the weights of the segment's start; the segment's last token triggers one update.

With the layer's input u_t, keys k, values v and queries q of a segment of C tokens:

    y_t = M_W(q_t)                                                     retrieval, of the last token as well
    G = d/dW mean over the segment and the width of (M_W(k) - v)^2     surprise, one gradient a segment
    alpha, theta, eta = limit * mean over the width of sigmoid(gate(mean of u over the segment))
    S = eta S - theta G
    W = (1 - alpha) W + S

Only W and S persist across segments; the convolutions start from zeros in each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...row_fields import RowField
from .. import exported
from ..layers import CausalConv, Linear, StreamState
from ..packed_row import Layout
from ..stream import StateInfo
from .options import ModelOptions

UNIT_FLOOR = 1e-12

Weights = list[Tensor]


def unit(x: Tensor) -> Tensor:
    """l2 normalisation of the last dimension, as in F.normalize: x / max(|x|, floor)."""
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp(min=UNIT_FLOOR)


def _activate(activation: str, z: Tensor) -> Tensor:
    if activation == "relu":
        return F.relu(z)
    return F.silu(z) if activation == "silu" else F.gelu(z)


def _derivative(activation: str, z: Tensor) -> Tensor:
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    return cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327


def read(activation: str, weights: Weights, x: Tensor) -> Tensor:
    """M_W(x). weights: (B, in, out) each; x: (B, T, D)."""
    for i, w in enumerate(weights):
        x = x @ w if i == 0 else _activate(activation, x) @ w
    return x


def gradients(activation: str, weights: Weights, k: Tensor, v: Tensor) -> Weights:
    """Gradients of mean((M_W(k) - v)^2) over tokens and width, per stream, by the analytic backward pass."""
    rows, pre = [k], []
    for i, w in enumerate(weights):
        z = rows[-1] @ w
        if i + 1 < len(weights):
            pre.append(z)
            rows.append(_activate(activation, z))
    d = (z - v) * (2 / (k.shape[-2] * k.shape[-1]))
    result = [rows[-1].transpose(-1, -2) @ d]
    for w, z, row in zip(reversed(weights[1:]), reversed(pre), reversed(rows[:-1]), strict=True):
        d = (d @ w.transpose(-1, -2)) * _derivative(activation, z)
        result.insert(0, row.transpose(-1, -2) @ d)
    return result


class SegmentMemory(nn.Module):
    """The layer, over a stream of (B, T, dim).

    State: "memory", packed rows (B, R) of W and S. State of the open segment: "sum", the sum of its inputs; "pairs",
    its keys and values side by side; "conv", the convolutions' last inputs.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options, dim = options, options.dim
        shapes = list(zip(options.memory_widths[:-1], options.memory_widths[1:], strict=True))
        self.qkv = Linear(dim, 3 * dim)
        self.conv = CausalConv(3 * dim, options.conv) if options.conv else None
        self.conv_bias = nn.Parameter(torch.zeros(3 * dim)) if options.conv else None
        self.gates = Linear(dim, 3 * dim, bias=True)  # forget gate, step size, momentum
        self.out = Linear(dim, dim)
        self.initial = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.layout = Layout.of(
            [
                RowField(f"{letter}{i}", shape, kind)
                for letter, kind in (("W", "weights"), ("S", "surprise"))
                for i, shape in enumerate(shapes)
            ]
        )

    def initial_state(self, batch: int) -> StreamState:
        dim, segment = self.options.dim, self.options.segment
        weights = list(self.initial)
        rows = self._pack(weights, [torch.zeros_like(w) for w in weights])
        state = {"memory": rows.expand(batch, -1)}
        if segment > 1:
            state["sum"] = rows.new_zeros(batch, dim)
            state["pairs"] = rows.new_zeros(batch, segment, 2 * dim)
            if self.conv is not None and self.conv.width > 1:
                state["conv"] = self.conv.initial_state(batch)
        return state

    def state_info(self) -> dict[str, StateInfo]:
        written = {"axis": 1, "first": [0], "period": self.options.segment}
        facts = {
            "memory": StateInfo("memory", self.layout.fields),
            "sum": StateInfo("conv"),
            "pairs": StateInfo("cache", written=written),
            "conv": StateInfo("conv"),
        }
        return {name: facts[name] for name in self.initial_state(1)}

    def _pack(self, w: Weights, s: Weights) -> Tensor:
        fields = {f"W{i}": x for i, x in enumerate(w)} | {f"S{i}": x for i, x in enumerate(s)}
        return self.layout.pack(fields)

    def _unpack(self, rows: Tensor) -> tuple[Weights, Weights]:
        fields = self.layout.unpack(rows)
        depth = range(len(self.initial))
        return [fields[f"W{i}"] for i in depth], [fields[f"S{i}"] for i in depth]

    def _project(self, u: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """u: (B, T, dim). Returns queries (B, T, dim), keys and values (B, T, 2 dim), and the next past of the
        convolutions.
        """
        x = self.qkv(u)
        if self.conv is not None and self.conv_bias is not None:
            x, past = self.conv(x, self.conv.initial_state(u.shape[0]) if past is None else past)
            x = x + self.conv_bias
        q, k, v = F.silu(x).chunk(3, -1)
        return unit(q), torch.cat([unit(k), v], -1), past

    def _update(self, w: Weights, s: Weights, pairs: Tensor, raw: Tensor) -> tuple[Weights, Weights]:
        """W and S after a segment with these pairs, (B, C, 2 dim). raw: (B, 3 dim), the gates' layer at the segment's
        mean input.
        """
        gates = torch.sigmoid(raw).reshape(-1, 3, self.options.dim).mean(-1)
        alpha, theta, eta = gates[:, :, None, None].unbind(1)
        theta, eta = theta * self.options.step_limit, eta * self.options.momentum_limit
        g = gradients(self.options.activation, w, *pairs.chunk(2, -1))
        s = [eta * s_i - theta * g_i for s_i, g_i in zip(s, g, strict=True)]
        return [(1 - alpha) * w_i + s_i for w_i, s_i in zip(w, s, strict=True)], s

    def segments(self, u: Tensor, state: StreamState, learn: Tensor | None) -> tuple[Tensor, StreamState]:
        """Processes whole segments, T = n C, from a segment's start."""
        batch, _, dim = u.shape
        size = self.options.segment
        u = u.reshape(-1, size, dim)
        q, pairs, past = self._project(u, None)
        pairs = pairs.reshape(batch, -1, size, 2 * dim)
        if learn is not None:
            pairs = torch.where(learn[:, None, None, None], pairs, torch.zeros_like(pairs))
        totals = u.sum(1).reshape(batch, -1, dim)
        (w, s), out = self._unpack(state["memory"]), []
        for i, q_i in enumerate(q.reshape(batch, -1, size, dim).unbind(1)):
            out.append(read(self.options.activation, w, q_i))
            after = self._update(w, s, pairs[:, i], self.gates(totals[:, i] / size))
            w, s = after if learn is None else (_where(learn, after[0], w), _where(learn, after[1], s))
        following = {"memory": self._pack(w, s)}
        if size > 1:
            following |= {"sum": totals[:, -1], "pairs": pairs[:, -1]}
            if past is not None and past.shape[1]:
                following["conv"] = past.reshape(batch, -1, *past.shape[1:])[:, -1]
        y: Tensor = self.out(torch.cat(out, 1))
        return y, following

    def part(self, u: Tensor, state: StreamState, place: Tensor, learn: Tensor | None) -> tuple[Tensor, StreamState]:
        """Processes T tokens of one segment. place: (B,) int64, of the first token within the segment.

        A frozen token stores a pair of zeros. Its gradient is 0, because M(0) = 0 without biases. The last token's
        `learn` decides whether the segment updates the memory.
        """
        length, size = u.shape[1], self.options.segment
        begins = (place == 0).unsqueeze(-1)
        total, past = state["sum"], state.get("conv")
        total = torch.where(begins, torch.zeros_like(total), total) + u.sum(1)
        if past is not None:
            past = torch.where(begins.unsqueeze(-1), torch.zeros_like(past), past)
        q, new, past = self._project(u, past)
        ends = place + length == size
        if learn is not None:
            new = torch.where(learn[:, None, None], new, torch.zeros_like(new))
            ends = ends & learn
        index = (place.unsqueeze(-1) + torch.arange(length, device=u.device)).unsqueeze(-1)
        pairs = state["pairs"].scatter(1, index.expand_as(new), new)
        y = read(self.options.activation, self._unpack(state["memory"])[0], q)

        # Parameters are passed as operands, because tracing does not lift captured tensors of a branch.
        def update(
            rows: Tensor, pairs: Tensor, mean: Tensor, ends: Tensor, weight: Tensor, bias: Tensor
        ) -> tuple[Tensor]:
            updated = self._pack(*self._update(*self._unpack(rows), pairs, mean @ weight + bias))
            return (torch.where(ends.unsqueeze(-1), updated, rows),)

        def leave(rows: Tensor, *unused: Tensor) -> tuple[Tensor]:
            return (rows.clone(),)

        assert self.gates.bias is not None
        operands = (state["memory"], pairs, total / size, ends, self.gates.weight, self.gates.bias)
        (rows,) = exported.branch(ends.any(), update, leave, *operands)
        following = {"memory": rows, "sum": total, "pairs": pairs}
        if past is not None and past.shape[1]:
            following["conv"] = past
        return self.out(y), following


def _where(condition: Tensor, yes: Weights, no: Weights) -> Weights:
    """Selects by stream. condition: (B,) bool."""
    return [torch.where(condition[:, None, None], a, b) for a, b in zip(yes, no, strict=True)]
