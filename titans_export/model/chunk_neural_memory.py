"""`ai.titans::ChunkNeuralMemory` in PyTorch: the reference, and the node that exported models contain.

docs/chunk-operator.md is the contract; chunk_update.py has the equations and the packed row. The ONNX function body is
traced from the reference. Memories that the operator does not cover are exported by tracing the reference too. Token t
reads the weights after the last complete chunk, including a chunk that t completes: y_t = M_W(q_t).

Shapes: packed rows (B, H, R); q (B, H, T, D); k, v (B, H, T u, D); step sizes (B, H, T u); other gates (B, H, T, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from ..operators import CHUNK_NEURAL_MEMORY
from . import exported
from .caches import rows_of, write_streams
from .chunk_update import (
    ChunkMemorySpec,
    Gates,
    State,
    chunk_layout,
    chunk_update,
    flat_weights,
    pick,
    state_fields,
    unpack_state,
)
from .fast_networks import NetworkSpec, forward
from .neural_memory import STATS


@dataclass(frozen=True)
class ChunkInputs:
    """The operator's inputs; see the module for the other shapes.

    momentum: (B, H, T, order). modulation: (B, H, T, tensors). combine: (B, H, T, terms). previous: (B, H, N, |W|), for
    the N chunks that the call may complete. fill: (B,). learn, valid: (B, T) bool, None for all True. limit: (B,).
    transition: ().
    """

    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    step_size: Tensor
    momentum: Tensor | None
    forget: Tensor
    fill: Tensor | None = None
    learn: Tensor | None = None
    valid: Tensor | None = None
    limit: Tensor | None = None
    modulation: Tensor | None = None
    combine: Tensor | None = None
    previous: Tensor | None = None
    previous_gate: Tensor | None = None
    transition: Tensor | None = None


def _slot(values: Tensor, index: Tensor) -> Tensor:
    """Selects from values (B, H, N, size), N small, at index (B,). Returns (B, H, size)."""
    if values.shape[2] == 1:
        return values[:, :, 0]
    slots = torch.arange(values.shape[2], device=index.device)
    chosen = (slots == index.unsqueeze(-1))[:, None, :, None]
    return torch.where(chosen, values, 0.0).sum(2)


class ChunkUpdate(NamedTuple):
    """The outputs. initial_weights: (B, H, N, |W|), W at the start of each completed chunk."""

    y: Tensor
    state: Tensor
    stats: Tensor
    initial_weights: Tensor


def _committed(
    spec: ChunkMemorySpec, old: State, new: State, losses: Tensor, x: ChunkInputs, done: Tensor | None
) -> tuple[State, Tensor]:
    """The committed state, and metrics (B, H, 4) in the order of `STATS`.

    done: (B,) or (B, H) bool, whether the chunk completes and learns; None for all True.
    """
    squares = [((a - b) ** 2).flatten(2).sum(-1) for a, b in zip(new.w, old.w, strict=True)]
    norm = torch.stack(squares).sum(0).sqrt()
    surprise = losses.sum(-1)
    good = torch.ones_like(norm, dtype=torch.bool) if x.limit is None else norm <= x.limit.unsqueeze(-1)
    on = torch.ones_like(good) if done is None else done.reshape(-1, 1).expand_as(good)
    zero = torch.zeros_like(norm)
    numbers = [torch.where(on, surprise, zero), torch.where(on, norm, zero), (on & good) + zero, (on & ~good) + zero]
    state = new if x.limit is None and done is None else pick(on & good, new, old)
    return state, torch.stack(numbers, -1)


def _total(numbers: Tensor) -> Tensor:
    """Sums (chunks, B, H, 4) to (B, H, 4)."""
    return torch.cat([numbers[..., :1].sum(0), numbers[..., 1:2].amax(0), numbers[..., 2:].sum(0)], -1)


def _moved(spec: ChunkMemorySpec, fill: Tensor | None, after: int) -> Tensor | None:
    """Whether the gradient point moves after `after` more tokens: (B,) bool, or None if it never moves."""
    if not (spec.keeps_point and spec.batch_size):
        return None
    assert fill is not None
    return torch.remainder(fill + after, spec.batch_size) == 0


def update_chunks(spec: ChunkMemorySpec, x: ChunkInputs) -> ChunkUpdate:
    """Processes whole chunks (T = n C), with every stream at a chunk's start. The chunks run in sequence, as one `Scan`
    when exported.
    """
    size, rows = spec.chunk_size, spec.rows
    count = x.q.shape[2] // size
    layout = chunk_layout(spec)
    begin = layout.unpack(x.rows)
    state = unpack_state(spec, begin)
    lead = x.rows.shape[:2]

    def parts(t: Tensor | None, per: int) -> Tensor | None:
        """(B, H, n per, ...) to (n, B, H, per, ...)."""
        if t is None:
            return None
        return t.reshape(*lead, count, per, *t.shape[3:]).movedim(2, 0)

    def last(t: Tensor | None) -> Tensor | None:
        found = parts(t, size)
        return None if found is None else found[:, :, :, -1]

    moves = [_moved(spec, x.fill, size * (i + 1)) for i in range(count)]
    done = None
    if x.learn is not None or x.valid is not None:
        on = torch.ones(lead[0], count * size, dtype=torch.bool, device=x.q.device)
        on = on if x.learn is None else on & x.learn
        on = on if x.valid is None else on & x.valid
        done = on.reshape(lead[0], count, size)[..., -1].movedim(1, 0)
    xs: dict[str, Tensor | None] = {
        "q": parts(x.q, size),
        "k": parts(x.k, rows),
        "v": parts(x.v, rows),
        "theta": parts(_masked_steps(spec, x), rows),
        "momentum": last(x.momentum),
        "forget": last(x.forget),
        "modulation": last(x.modulation),
        "combine": last(x.combine),
        "previous": None if x.previous is None else x.previous.movedim(2, 0),
        "previous_gate": last(x.previous_gate),
        "moved": None if moves[0] is None else torch.stack([m for m in moves if m is not None]),
        "done": done,
    }
    keys = [name for name, value in xs.items() if value is not None]
    given = [value for value in xs.values() if value is not None]

    def step(carry: list[Tensor], values: list[Tensor], number: int) -> tuple[list[Tensor], list[Tensor]]:
        old = _unflatten(spec, carry)
        one = dict(zip(keys, values, strict=True))
        gates = Gates(
            one.get("momentum"),
            one["forget"],
            one.get("modulation"),
            one.get("combine"),
            one.get("previous"),
            one.get("previous_gate"),
            x.transition,
        )
        new, losses = chunk_update(spec, old, one["k"], one["v"], one["theta"], gates, one.get("moved"))
        new, numbers = _committed(spec, old, new, losses, x, one.get("done"))
        q = one["q"]
        y = torch.cat([forward(spec.network, old.w, q[:, :, :-1]), forward(spec.network, new.w, q[:, :, -1:])], 2)
        return _flatten(new), [y, numbers, flat_weights(old.w, 2)]

    carry, outs = exported.scan(step, _flatten(state), given)
    y, numbers, before = outs
    state = _unflatten(spec, carry)
    fields = {name: begin[name] for name in ("k", "v", "theta")} | state_fields(spec, state)
    y = y.movedim(0, 2).reshape(x.q.shape)
    return ChunkUpdate(y, layout.pack(fields), _total(numbers), before.movedim(0, 2))


def _masked_steps(spec: ChunkMemorySpec, x: ChunkInputs) -> Tensor:
    """Step sizes, 0 for tokens that do not learn."""
    if x.learn is None and x.valid is None:
        return x.step_size
    on = torch.ones(x.q.shape[0], x.q.shape[2], dtype=torch.bool, device=x.q.device)
    on = on if x.learn is None else on & x.learn
    on = on if x.valid is None else on & x.valid
    on = on.repeat_interleave(spec.keys_per_token, -1).unsqueeze(1)
    return torch.where(on, x.step_size, torch.zeros_like(x.step_size))


def _flatten(state: State) -> list[Tensor]:
    return [*state.w, *(state.point or []), *(t for order in state.s for t in order)]


def _unflatten(spec: ChunkMemorySpec, tensors: list[Tensor]) -> State:
    count = len(spec.network.shapes)
    groups = [list(tensors[i : i + count]) for i in range(0, len(tensors), count)]
    point = groups.pop(1) if spec.keeps_point else None
    return State(groups[0], point, groups[1:])


def _place(old: Tensor, new: Tensor, place: Tensor, counts: Tensor | None) -> Tensor:
    """Writes new, (B, H, u, size), into old, (B, H, rows, size), from row `place`, (B,), on.

    counts: (B,) bool, streams to write; None for all.
    """
    index = torch.arange(old.shape[2], device=old.device)
    for j in range(new.shape[2]):
        at = index == (place + j).unsqueeze(-1)
        at = at if counts is None else at & counts.unsqueeze(-1)
        old = torch.where(at[:, None, :, None], new[:, :, j : j + 1], old)
    return old


def update_open(spec: ChunkMemorySpec, x: ChunkInputs) -> ChunkUpdate:
    """Processes token by token, with streams anywhere in their chunks. An `If` guards the update of a full chunk.

    fill counts tokens since the gradient point last moved. It counts from the chunk's start if the point never moves or
    moves with every chunk.
    """
    assert x.fill is not None
    size, u, tokens = spec.chunk_size, spec.keys_per_token, x.q.shape[2]
    layout = chunk_layout(spec)
    slots = (tokens + size - 1) // size

    def parts(t: Tensor | None, per: int) -> Tensor | None:
        """(B, H, T per, ...) to (T, B, H, per, ...)."""
        return None if t is None else t.reshape(*t.shape[:2], tokens, per, *t.shape[3:]).movedim(2, 0)

    def each(t: Tensor | None) -> Tensor | None:
        """(B, T) to (T, B)."""
        return None if t is None else t.movedim(1, 0)

    def gate(t: Tensor | None) -> Tensor | None:
        """(B, H, T, ...) to (T, B, H, ...)."""
        return None if t is None else t.movedim(2, 0)

    xs: dict[str, Tensor | None] = {
        "q": parts(x.q, 1),
        "k": parts(x.k, u),
        "v": parts(x.v, u),
        "theta": parts(_masked_steps(spec, x), u),
        "momentum": gate(x.momentum),
        "forget": gate(x.forget),
        "modulation": gate(x.modulation),
        "combine": gate(x.combine),
        "previous_gate": gate(x.previous_gate),
        "learn": each(x.learn),
        "valid": each(x.valid),
    }
    keys = [name for name, value in xs.items() if value is not None]
    given = [value for value in xs.values() if value is not None]

    def step(carry: list[Tensor], values: list[Tensor], number: int) -> tuple[list[Tensor], list[Tensor]]:
        rows, fill, completed, before = carry
        one = dict(zip(keys, values, strict=True))
        counts = one.get("valid")
        fields = layout.unpack(rows)
        place = torch.remainder(fill, size) * u
        fields["k"] = _place(fields["k"], one["k"], place, counts)
        fields["v"] = _place(fields["v"], one["v"], place, counts)
        fields["theta"] = _place(fields["theta"].unsqueeze(-1), one["theta"].unsqueeze(-1), place, counts).squeeze(-1)
        after = fill + 1 if counts is None else fill + counts.to(fill.dtype)
        full = (torch.remainder(after, size) == 0) & (after > fill)
        learns = full & one["learn"] if "learn" in one else full
        moved = _moved(spec, after, 0)
        gates = Gates(
            one.get("momentum"),
            one["forget"],
            one.get("modulation"),
            one.get("combine"),
            None if x.previous is None else _slot(x.previous, completed),
            one.get("previous_gate"),
            x.transition,
        )
        kinds = [value is not None for value in gates]

        def complete(rows: Tensor, learns: Tensor, moved: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            fields, values = layout.unpack(rows), iter(rest)
            gates = Gates(*(next(values) if kind else None for kind in kinds))  # type: ignore[arg-type]
            old = unpack_state(spec, fields)
            new, losses = chunk_update(spec, old, fields["k"], fields["v"], fields["theta"], gates, moved)
            new, numbers = _committed(spec, old, new, losses, x, learns)
            # Sizes are symbolic inside a loop, so both branches must state that theirs are equal.
            packed = layout.pack(fields | state_fields(spec, new))
            return packed.reshape(rows.shape), numbers.reshape(*rows.shape[:2], 4)

        def leave(rows: Tensor, learns: Tensor, moved: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            return rows.clone(), torch.zeros(*rows.shape[:2], 4, dtype=rows.dtype, device=rows.device)

        rows, numbers = exported.branch(
            full.any(),
            complete,
            leave,
            layout.pack(fields),
            learns,
            torch.zeros_like(full) if moved is None else moved,
            *(value for value in gates if value is not None),
            token=number,
        )
        weights = unpack_state(spec, layout.unpack(rows)).w
        y = forward(spec.network, weights, one["q"])
        completed = completed + full.to(completed.dtype)
        if slots > 1:
            # Slot j holds W until more than j chunks are complete.
            later = torch.arange(slots, device=fill.device) >= completed.unsqueeze(-1)
            before = torch.where(later[:, None, :, None], flat_weights(weights, 2).unsqueeze(2), before)
        return [rows, torch.remainder(after, spec.period), completed, before], [y, numbers]

    first = flat_weights(unpack_state(spec, layout.unpack(x.rows)).w, 2).unsqueeze(2)
    carry, (y, numbers) = exported.scan(
        step, [x.rows, x.fill, torch.zeros_like(x.fill), first.expand(-1, -1, slots, -1)], given
    )
    return ChunkUpdate(y.movedim(0, 2).reshape(x.q.shape), carry[0], _total(numbers), carry[3])


def update_chunk_memory(spec: ChunkMemorySpec, x: ChunkInputs, aligned: bool) -> ChunkUpdate:
    """The operator in mode "update", without slots; shapes as in the module."""
    if x.valid is not None:
        # Masking by multiplication would keep NaN, which padding may hold.
        def clean(t: Tensor, times: int) -> Tensor:
            assert x.valid is not None
            on = x.valid.repeat_interleave(times, -1)[:, None, :, None]
            return torch.where(on, t, torch.zeros_like(t))

        u = spec.keys_per_token
        x = replace(x, q=clean(x.q, 1), k=clean(x.k, u), v=clean(x.v, u))
    return update_chunks(spec, x) if aligned else update_open(spec, x)


def attributes(spec: ChunkMemorySpec, aligned: bool) -> dict[str, Any]:
    """The node's attributes, except those of the memory dtype."""
    network = spec.network
    return {
        "schedule": "aligned" if aligned else "any",
        "widths": [network.width, *((network.hidden,) * (network.depth - 1)), network.width],
        "activation": network.activation,
        "residual": int(network.residual),
        "layer_norm": int(network.norm),
        "chunk_size": spec.chunk_size,
        "batch_size": spec.batch_size,
        "loss_scale": spec.loss_scale,
        "keys_per_token": spec.keys_per_token,
        "lookahead": int(spec.lookahead),
        "norm_weight": "fast" if network.norm else "slow",
        "momentum_order": spec.momentum_order,
        "grad_clamp": spec.grad_clamp,
        "orthogonalise": spec.orthogonalise,
    }


def _spec(values: Mapping[str, Any]) -> ChunkMemorySpec:
    widths = values["widths"]
    network = NetworkSpec(
        "mlp",
        widths[0],
        len(widths) - 1,
        widths[1],
        values["activation"],
        bool(values["residual"]),
        bool(values["layer_norm"]),
    )
    return ChunkMemorySpec(
        network,
        values["chunk_size"],
        values["chunk_size"] if values["batch_size"] is None else values["batch_size"],
        values["loss_scale"],
        values["keys_per_token"],
        bool(values["lookahead"]),
        values["momentum_order"],
        None,
        values["grad_clamp"],
        values["orthogonalise"],
    )


def _check_covered(values: Mapping[str, Any], present: Collection[str]) -> None:
    """Raises UsageError for unsupported inputs and attributes. The exporter never emits them."""
    name = next((name for name in ("valid", "norm_scale") if name in present), None)
    if name is None and len(set(values["widths"][1:-1])) > 1:
        name = "widths"
    if name is None and values["layer_norm"] and values["norm_weight"] != "fast":
        name = "norm_weight"
    if name is not None:
        problem = f"no function body for a node with this {name}"
        raise UsageError("E0720", CHUNK_NEURAL_MEMORY.name, problem, "write the body by hand, or leave it out")


def reference(values: Mapping[str, Any], present: Collection[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the inputs named in `present`. `values` has all attributes."""
    _check_covered(values, present)
    spec, aligned = _spec(values), values["schedule"] == "aligned"

    def compute(**inputs: Tensor) -> tuple[Tensor, ...]:
        learn, momentum, slots = inputs.get("learn"), inputs.get("momentum"), inputs.get("slots")
        x = ChunkInputs(
            rows=rows_of(inputs["state"], slots),
            q=inputs["q"],
            k=inputs["k"],
            v=inputs["v"],
            step_size=inputs["step_size"],
            momentum=None if momentum is None else momentum.unsqueeze(-1),
            forget=inputs["forget_gate"],
            fill=inputs.get("fill"),
            learn=None if learn is None else learn.unsqueeze(-1).expand(-1, inputs["q"].shape[2]),
            limit=inputs.get("update_limit"),
            modulation=inputs.get("modulation"),
            previous=inputs.get("previous"),
            previous_gate=inputs.get("previous_gate"),
        )
        return tuple(_in_pool(update_chunk_memory(spec, x, aligned), inputs["state"], slots))

    return compute


def _in_pool(result: ChunkUpdate, pool: Tensor, slots: Tensor | None) -> ChunkUpdate:
    """The result with the whole pool as its state."""
    return result if slots is None else result._replace(state=write_streams(pool, slots, result.state))


def chunk_memory_update(
    spec: ChunkMemorySpec,
    x: ChunkInputs,
    position: Tensor,
    learn: Tensor | None,
    aligned: bool,
    slots: Tensor | None = None,
) -> ChunkUpdate:
    """Updates and reads the memory: the reference, or a node while exporting. Sets `fill` and `learn` of x.

    x.momentum: (B, H, T) for an order of 1, which saves a node; else as in `ChunkInputs`.
    x.rows: (P, H, R), a pool with one row per slot; so is the result's state. position: (B,) int64, rows consumed
    before the call; learn: (B,) bool, None for all True. slots: (B,) int64, distinct, the row of each stream; None for
    0..B-1, with P = B.
    """
    counts = not aligned or spec.transition or spec.period != spec.chunk_size
    fill = torch.remainder(position, spec.period) if counts else None
    if torch.compiler.is_exporting() and spec.fused:
        lead, tokens = x.q.shape[:2], x.q.shape[2]
        chunks = (tokens + spec.chunk_size - 1) // spec.chunk_size
        inputs = {
            "state": x.rows,
            "q": x.q,
            "k": x.k,
            "v": x.v,
            "step_size": x.step_size,
            "momentum": x.momentum,
            "forget_gate": x.forget,
            "fill": fill,
            "learn": learn,
            "slots": slots,
            "modulation": x.modulation,
            "previous": x.previous,
            "previous_gate": x.previous_gate,
        }
        shapes = (x.q.shape, x.rows.shape, (*lead, len(STATS)), (*lead, chunks, spec.weight_count()))
        return ChunkUpdate(*exported.node(CHUNK_NEURAL_MEMORY, attributes(spec, aligned), inputs, shapes))
    learns = None if learn is None else learn.unsqueeze(-1).expand(-1, x.q.shape[2])
    momentum = x.momentum
    if momentum is not None and momentum.dim() == 3:
        momentum = momentum.unsqueeze(-1)
    given = replace(x, rows=rows_of(x.rows, slots), momentum=momentum, fill=fill, learn=learns)
    return _in_pool(update_chunk_memory(spec, given, aligned), x.rows, slots)
