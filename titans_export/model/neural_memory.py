"""`ai.titans::NeuralMemory` in PyTorch: its packed row, the reference, and the node that exported models contain.

docs/operator.md is the contract; memory.py has the equations. The ONNX function body is traced from the reference, and
tests compare every kernel with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import NEURAL_MEMORY
from ..row_fields import RowField
from . import exported
from .layers import Step
from .memory import CachedChunk, Gates, MemorySpec, State, chunk_update, coefficients, read, surprise
from .packed_row import Layout

STATS = ("surprise", "update_norm", "committed", "rejected")


def memory_layout(spec: MemorySpec, memory_dtype: str = "float32", rounding: str = "nearest") -> Layout:
    """The packed row: W | S | rows of the open chunk | their coefficients | padding."""
    c = spec.chunk_size
    fields = [RowField(f"W{i}", s, "weights") for i, s in enumerate(spec.shapes)]
    fields += [RowField(f"S{i}", s, "surprise") for i, s in enumerate(spec.shapes)]
    for i, (width_in, width_out) in enumerate(spec.shapes):
        fields.append(RowField(f"layer_input{i}", (c, width_in), "open_chunk"))
        fields.append(RowField(f"output_grad{i}", (c, width_out), "open_chunk"))
    fields += [RowField(name, (c,), "coefficient", at_start=0) for name in "ea"]
    fields += [RowField(name, (), "coefficient", at_start=start) for name, start in (("m", 1), ("f", 0), ("beta", 1))]
    return Layout.of(fields, memory_dtype, rounding)


def initial_rows(spec: MemorySpec, weights: list[Tensor]) -> Tensor:
    """Packed rows (..., R) of a new memory with weights W, S = 0 and an empty chunk."""
    lead = weights[0].shape[:-2]
    zeros = [torch.zeros_like(w) for w in weights]
    return _pack_aligned(spec, State(weights, zeros), lead)


def _pack_aligned(spec: MemorySpec, state: State, lead: torch.Size) -> Tensor:
    """Packed rows at a chunk's start: no cached rows, m = 1, f = 0, beta = 1."""
    layout = memory_layout(spec)
    like = state.w[0]
    fields = {
        f.name: like.new_full((1,), float(f.name in ("m", "beta"))).expand(*lead, *f.shape) for f in layout.fields
    }
    fields |= {f"W{i}": w for i, w in enumerate(state.w)} | {f"S{i}": s for i, s in enumerate(state.s)}
    return layout.pack(fields)


def _weights(spec: MemorySpec, fields: dict[str, Tensor]) -> State:
    depth = range(spec.depth)
    return State([fields[f"W{i}"] for i in depth], [fields[f"S{i}"] for i in depth])


def _open_chunk(spec: MemorySpec, fields: dict[str, Tensor]) -> CachedChunk:
    depth = range(spec.depth)
    return CachedChunk(
        [fields[f"layer_input{i}"] for i in depth],
        [fields[f"output_grad{i}"] for i in depth],
        *(fields[name] for name in ("e", "a", "m", "f", "beta")),
    )


def _pack_open(spec: MemorySpec, state: State, chunk: CachedChunk) -> Tensor:
    fields = {name: getattr(chunk, name) for name in ("e", "a", "m", "f", "beta")}
    for i in range(spec.depth):
        fields |= {
            f"W{i}": state.w[i],
            f"S{i}": state.s[i],
            f"layer_input{i}": chunk.layer_input[i],
            f"output_grad{i}": chunk.output_grad[i],
        }
    return memory_layout(spec).pack(fields)


def read_memory(spec: MemorySpec, state: Tensor, q: Tensor, norm_scale: Tensor | None = None) -> Tensor:
    """mode "read": y = M_W(q) with W at the open chunk's start. Nothing is updated.

    state: (B, H, R) packed rows; q: (B, H, T, D); norm_scale: (H, D) with layer_norm. Returns (B, H, T, D).
    """
    return read(spec, _weights(spec, memory_layout(spec).unpack(state)).w, q, norm_scale)


class Update(NamedTuple):
    """Outputs of mode "update": retrievals y (B, H, T, D), packed rows (B, H, R), metrics (B, H, 4) in the order of
    `STATS`.
    """

    y: Tensor
    state: Tensor
    stats: Tensor


@dataclass(frozen=True)
class Inputs:
    """The operator's inputs. q, k, v: (B, H, T, D); gates: (B, H, T).

    active: (B, T) float, 1 if the token is valid and the stream learns; None for all 1.
    valid: (B, T) float, None for all 1. A frozen token (valid, not active) fills its place in the chunk; an invalid
    token does not.
    norm_scale: (H, D) or None.
    update_limit: (B,) or None. A chunk is not committed if its update is not finite or has a larger Frobenius norm,
    over all layers of a head.
    """

    state: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    step_size: Tensor
    momentum: Tensor
    forget_gate: Tensor
    active: Tensor | None = None
    valid: Tensor | None = None
    norm_scale: Tensor | None = None
    update_limit: Tensor | None = None

    @property
    def gates(self) -> Gates:
        on = None if self.active is None else self.active.unsqueeze(-2)
        return Gates(self.step_size, self.momentum, self.forget_gate, on)


def _norm(new: State, old: State) -> Tensor:
    """Frobenius norm of a chunk's change of W, by stream and head: (B, H)."""
    squares = [((a - b) ** 2).sum((-1, -2)) for a, b in zip(new.w, old.w, strict=True)]
    return torch.stack(squares).sum(0).sqrt()


def _guard(new: State, old: State, limit: Tensor | None) -> tuple[State, Tensor, Tensor]:
    """The state to commit, the update's norm (B, H), and whether it is committed (1 or 0), (B, H)."""
    norm = _norm(new, old)
    if limit is None:
        return new, norm, torch.ones_like(norm)
    good = norm <= limit.unsqueeze(-1)  # false for NaN
    pick = good[..., None, None]
    kept = State(*([torch.where(pick, a, b) for a, b in zip(n, o, strict=True)] for n, o in zip(new, old, strict=True)))
    return kept, norm, good.to(norm.dtype)


def update_aligned(spec: MemorySpec, x: Inputs) -> Update:
    """mode "update", schedule "aligned": every stream at a chunk's start and T a multiple of the chunk.

    Also accepts a shorter last chunk, for training and the tail of a text. The returned W and S then treat that chunk
    as complete; no stream may continue from them.
    """
    lead = x.state.shape[:-1]
    state = _weights(spec, memory_layout(spec).unpack(x.state))
    size = spec.chunk_size
    out: list[Tensor] = []
    loss: list[Tensor] = []
    norms: list[Tensor] = []
    committed: list[Tensor] = []
    rejected: list[Tensor] = []
    parts = (t.split(size, -2) for t in (x.q, x.k, x.v))
    for q, k, v, gates in zip(*parts, x.gates.chunks(size), strict=True):
        y, new, losses = chunk_update(spec, state, q, k, v, coefficients(gates), x.norm_scale)
        state, norm, good = _guard(new, state, x.update_limit)
        done = torch.ones_like(norm) if x.valid is None else x.valid[:, size * len(out), None].expand_as(norm)
        out.append(y)
        loss.append(losses if gates.active is None else losses * gates.active)
        norms.append(torch.where(done > 0, norm, torch.zeros_like(norm)))
        committed.append(done * good)
        rejected.append(done * (1 - good))
    stats = [
        torch.cat(loss, -1).sum(-1),
        torch.stack(norms).amax(0),
        torch.stack(committed).sum(0),
        torch.stack(rejected).sum(0),
    ]
    return Update(torch.cat(out, -2), _pack_aligned(spec, state, lead), torch.stack(stats, -1))


def update_tokens(spec: MemorySpec, x: Inputs, fill: Tensor) -> Update:
    """mode "update", schedule "any": token by token in cached form, with an update at each chunk's end.

    fill: (B,) int64, tokens in each stream's open chunk, in [0, chunk). Streams may differ.
    """
    fields = memory_layout(spec).unpack(x.state)
    state, chunk = _weights(spec, fields), _open_chunk(spec, fields)
    theta, eta, keep, on = x.gates.masked()
    size = spec.chunk_size
    index = torch.arange(size, device=fill.device)
    rows, out, stats = x.state, [], []
    for t in range(x.q.shape[-2]):
        g = surprise(spec, state.w, x.k[..., t : t + 1, :], x.v[..., t : t + 1, :], x.norm_scale)
        at = (index == fill.unsqueeze(-1)).unsqueeze(-2)
        chunk = chunk.append(at, g, theta[..., t], eta[..., t], keep[..., t], on[..., t])
        out.append(chunk.read(spec, state, x.q[..., t : t + 1, :], x.norm_scale))
        rows, surprised = _pack_open(spec, state, chunk), g.loss[..., 0] * on[..., t]
        after = fill + 1 if x.valid is None else fill + x.valid[..., t].to(fill.dtype)
        full = after == size

        def update(rows: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
            fields = memory_layout(spec).unpack(rows)
            old = _weights(spec, fields)
            new, norm, good = _guard(_open_chunk(spec, fields).update(old), old, x.update_limit)
            this = full.to(norm.dtype).unsqueeze(-1)
            updated = _pack_aligned(spec, new, norm.shape)
            rows = torch.where(full[:, None, None], updated, rows)
            # where, because a multiplication would spread NaN from streams whose chunk is not full.
            norm = torch.where(full.unsqueeze(-1), norm, torch.zeros_like(norm))
            return rows, torch.stack([norm, this * good, this * (1 - good)], -1)

        def leave(rows: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
            return rows.clone(), torch.zeros(*rows.shape[:-1], 3, dtype=rows.dtype, device=rows.device)

        rows, numbers = exported.branch(full.any(), update, leave, rows, full, token=t)
        stats.append(torch.cat([surprised.unsqueeze(-1), numbers], -1))
        fill = torch.where(full, torch.zeros_like(fill), after)
        if t + 1 < x.q.shape[-2]:
            fields = memory_layout(spec).unpack(rows)
            state, chunk = _weights(spec, fields), _open_chunk(spec, fields)
    if len(stats) == 1:
        return Update(out[0], rows, stats[0])
    each = torch.stack(stats)
    total = torch.cat([each[..., :1].sum(0), each[..., 1:2].amax(0), each[..., 2:].sum(0)], -1)
    return Update(torch.cat(out, -2), rows, total)


def neural_memory_update(
    spec: MemorySpec,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    momentum: Tensor,
    forget_gate: Tensor,
    fill: Tensor | None = None,
    learn: Tensor | None = None,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    update_limit: Tensor | None = None,
    norm_scale: Tensor | None = None,
) -> Update:
    """mode "update" with the operator's own inputs, in their order. fill None selects schedule "aligned".

    state: (P, H, R), a pool with one row per slot; slots: (B,) int64, distinct, the row of each stream, None for 0..B-1
    with P = B. fill, valid: (B,) int64; learn: (B,) bool; update_limit: (B,) float. Other shapes as in `Inputs`.
    Returns the whole pool with the rows of `slots` updated.
    """
    rows = state if slots is None else state[slots]
    counts = None
    if valid is not None:
        inside = torch.arange(q.shape[-2], device=q.device) < valid.unsqueeze(-1)
        counts = inside.to(q.dtype)
        # Masking by multiplication would keep NaN, which padding may hold.
        tokens = inside[:, None, :, None]
        q, k, v = (torch.where(tokens, x, torch.zeros_like(x)) for x in (q, k, v))
    active = counts
    if learn is not None:
        on = learn.to(q.dtype).unsqueeze(-1)
        active = on.expand(-1, q.shape[-2]) if counts is None else counts * on
    x = Inputs(rows, q, k, v, step_size, momentum, forget_gate, active, counts, norm_scale, update_limit)
    result = update_aligned(spec, x) if fill is None else update_tokens(spec, x, fill)
    if slots is None:
        return result
    return Update(result.y, state.index_copy(0, slots, result.state), result.stats)


def neural_memory_read(
    spec: MemorySpec, state: Tensor, q: Tensor, slots: Tensor | None = None, norm_scale: Tensor | None = None
) -> Tensor:
    """mode "read" with the operator's own inputs; shapes as in `neural_memory_update`. Returns (B, H, T, D)."""
    return read_memory(spec, state if slots is None else state[slots], q, norm_scale)


def attributes(spec: MemorySpec, mode: str, aligned: bool) -> dict[str, Any]:
    """The node's attributes, except those of the memory dtype."""
    return {
        "mode": mode,
        "schedule": "aligned" if aligned else "any",
        "widths": list(spec.widths),
        "activation": spec.activation,
        "residual": int(spec.residual),
        "layer_norm": int(spec.layer_norm),
        "chunk_size": spec.chunk_size,
    }


def reference(values: Mapping[str, Any], present: Collection[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the inputs named in `present`. `values` has all attributes."""
    spec = MemorySpec(
        tuple(values["widths"]),
        values["activation"],
        bool(values["residual"]),
        bool(values["layer_norm"]),
        values["chunk_size"],
    )
    if values["mode"] == "read":
        return lambda **inputs: (neural_memory_read(spec, **inputs),)
    return lambda **inputs: tuple(neural_memory_update(spec, **inputs))


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
    """Updates and reads the memory: the reference, or a node while exporting. Shapes as in `neural_memory_update`.

    Returns y and the packed rows.
    """
    fill = None if step.aligned else torch.remainder(step.position, spec.chunk_size)
    step_size, momentum, forget_gate = gates
    inputs = {
        "state": state,
        "q": q,
        "k": k,
        "v": v,
        "step_size": step_size,
        "momentum": momentum,
        "forget_gate": forget_gate,
        "fill": fill,
        "learn": step.learn,
        "slots": step.slots,
        "norm_scale": norm_scale,
    }
    if torch.compiler.is_exporting():
        shapes = (q.shape, state.shape, (*q.shape[:2], len(STATS)))
        y, rows, _ = exported.node(NEURAL_MEMORY, attributes(spec, "update", step.aligned), inputs, shapes)
        return y, rows
    result = neural_memory_update(spec, **inputs)  # type: ignore[arg-type]
    return result.y, result.state


def memory_read(
    spec: MemorySpec, state: Tensor, q: Tensor, slots: Tensor | None = None, norm_scale: Tensor | None = None
) -> Tensor:
    """Reads the memory at the open chunk's start: the reference, or a node while exporting. Returns (B, H, T, D)."""
    if torch.compiler.is_exporting():
        inputs = {"state": state, "q": q, "slots": slots, "norm_scale": norm_scale}
        return exported.node(NEURAL_MEMORY, attributes(spec, "read", False), inputs, (q.shape,))[0]
    return neural_memory_read(spec, state, q, slots, norm_scale)
