"""NeuralMemory of titans-pytorch 0.5 as a stream layer: computes keys, values, queries and gates from vectors.

The gates depend on the mean, or on an attention pool, of the normed key inputs over a chunk. The state holds the last C
- 1 of these rows, so the token that completes a chunk sees the whole chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..caches import rows_of, write_streams
from ..causal_convolution import causal_convolution
from ..chunk_neural_memory import ChunkInputs, ChunkUpdate, chunk_memory_update
from ..chunk_update import ChunkMemorySpec, chunk_layout, initial_chunk_rows
from ..fast_networks import NetworkSpec
from ..layers import Linear, StreamState, flat, join_heads
from ..stream import StateInfo
from .options import MemoryOptions

NEWTON_SCHULZ_STEPS = 5
NORM_EPS = torch.finfo(torch.float32).eps
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def memory_spec(options: MemoryOptions) -> ChunkMemorySpec:
    """The memory's structure from the constructor's arguments."""
    network = NetworkSpec(
        kind=options.network.kind,
        width=options.dim_head,
        depth=options.network.depth,
        hidden=options.network.hidden,
        residual=options.mem_model_norm_add_residual,
        norm=options.mem_model_norm_add_residual,
    )
    combine = None
    if options.learned_momentum_combine:
        combine = "surprise and momenta" if options.learned_combine_include_zeroth else "momenta"
    return ChunkMemorySpec(
        network,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size or 0,
        loss_scale=1 / options.dim_head,
        keys_per_token=options.num_kv_per_token,
        lookahead=options.store_with_lookahead_value,
        momentum_order=options.momentum_order if options.momentum else 0,
        combine=combine,
        grad_clamp=options.max_grad_norm or 0.0,
        orthogonalise=NEWTON_SCHULZ_STEPS if options.spectral_norm_surprises else 0,
        transition=options.gated_transition and bool(options.batch_size),
    )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """nn.RMSNorm with its default epsilon in float32, also for a float64 reference. weight: (D,)."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def per_head(x: Tensor) -> Tensor:
    """(B, T, heads) to (B, heads, T, 1)."""
    batch, length, heads = x.shape
    return x.reshape(batch, heads, 1, 1) if length == 1 else x.transpose(1, 2).unsqueeze(-1)


class HeadNorm(nn.Module):
    """RMSNorm over a head's width, with one scale per head. x: (B, heads, T, D)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        # The norm node takes a constant weight. It must not be 1, because the optimiser would remove a multiplication
        # by 1 and the norm would no longer fuse into one node.
        y: Tensor = rms_norm(x, x.new_full((size,), size**-0.5)) * (self.weight * size**0.5)
        return y


class NeuralMemoryLayer(nn.Module):
    """The layer. Its views are (B, T, dim) each; they may be the same tensor."""

    def __init__(self, options: MemoryOptions) -> None:
        super().__init__()
        self.options, self.spec = options, memory_spec(options)
        dim, heads, inner = options.dim, options.heads, options.dim_head * options.heads
        u, tensors = options.num_kv_per_token, len(self.spec.network.shapes)
        self.retrieve_norm = nn.Parameter(torch.ones(dim)) if options.pre_rmsnorm else None
        self.store_norm = nn.Parameter(torch.ones(dim)) if options.pre_rmsnorm else None
        self.q_norm = HeadNorm(heads, options.dim_head) if options.qk_rmsnorm else None
        self.k_norm = HeadNorm(heads, options.dim_head) if options.qk_rmsnorm else None
        self.post_norm = HeadNorm(heads, options.dim_head) if options.post_rmsnorm else None
        # With several heads, the query projection also yields the retrieval gates, after the queries.
        self.query = Linear(dim, inner + (heads if heads > 1 else 0))
        # Keys, then step sizes, then the logits of the pool.
        self.key_sizes = [inner * u, heads * u, dim if options.attn_pool_chunks else 0]
        self.key = Linear(dim, sum(self.key_sizes), bias=True)
        self.value = Linear(dim, inner * u)
        self.gate_sizes = {
            "forget": 1,
            "momentum": self.spec.momentum_order,
            "modulation": tensors if options.per_parameter_lr_modulation else 0,
            "previous_gate": int(options.accept_weight_residual),
            "combine": self._terms(),
        }
        self.gates = Linear(dim, heads * sum(self.gate_sizes.values()), bias=True)
        self.out = Linear(inner, dim) if heads > 1 else None
        self.transition = nn.Parameter(torch.zeros(())) if options.gated_transition else None
        # Shape (heads, ...), or (1, ...) if the heads share their initial weights.
        self.initial = nn.ParameterList(torch.zeros(heads, *shape) for shape in self.spec.network.shapes.values())

    def _terms(self) -> int:
        if self.spec.combine is None:
            return 0
        return self.spec.momentum_order + (self.spec.combine == "surprise and momenta")

    def initial_state(self, batch: int) -> StreamState:
        rows = initial_chunk_rows(self.spec, list(self.initial))
        state = {"memory": rows.expand(batch, -1, -1)}
        past = self.spec.chunk_size - 1
        if past:
            for name in self._pools():
                state[name] = rows.new_zeros(batch, past, self.options.dim)
        return state

    def _pools(self) -> list[str]:
        return ["pool", "pool_logits"] if self.options.attn_pool_chunks else ["pool"]

    def state_info(self) -> dict[str, StateInfo]:
        # Only the operator's node guarantees that it changes nothing else in the state.
        chunk, operator = (self.spec.chunk_size, "ChunkNeuralMemory") if self.spec.fused else (None, None)
        layout = chunk_layout(self.spec).fields
        facts = {"memory": StateInfo("memory", layout, chunk=chunk, operator=operator)}
        if self.spec.chunk_size > 1:
            facts |= {name: StateInfo("conv") for name in self._pools()}
        return facts

    def _heads(self, x: Tensor, length: int, per_token: int) -> Tensor:
        """(B T, heads per_token D), or (B, T, heads per_token D), to (B, heads, T per_token, D), head-major. length:
        T.
        """
        heads, width = self.options.heads, self.options.dim_head
        if length > 1 and heads > 1:
            x = x.reshape(-1, length, heads, per_token, width).transpose(1, 2)
        return x.reshape(-1, heads, length * per_token, width)

    def _pool(
        self, x: Tensor, logits: Tensor | None, state: StreamState, aligned: bool, slots: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """The input of the gates, (B, chunks, dim) if aligned, else (B, T, dim), and the next state. A weighted pool
        of a single row is (B, dim), which saves graphs a Reshape.
        """
        size = self.spec.chunk_size
        if size == 1:
            return x, {}
        if logits is not None:
            return self._weighted_pool({"pool": x, "pool_logits": logits}, state, aligned, slots)
        # The mean over a row and the chunk_size - 1 before it.
        mean, following = causal_convolution(state["pool"], x, x.new_full((size, x.shape[-1]), 1 / size), slots=slots)
        if aligned:
            mean = mean.reshape(x.shape[0], -1, size, x.shape[-1])[:, :, -1]
        return mean, {"pool": following}

    def _weighted_pool(
        self, new: dict[str, Tensor], state: StreamState, aligned: bool, slots: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """The sum over a chunk's rows, or over a row and those before it, weighted by a softmax of their logits."""
        size, length = self.spec.chunk_size, new["pool"].shape[1]
        rows = {name: torch.cat([rows_of(state[name], slots), value], 1) for name, value in new.items()}
        following = {name: write_streams(state[name], slots, value[:, length:]) for name, value in rows.items()}
        if length == 1 and not aligned:
            pooled: Tensor = (rows["pool_logits"].softmax(1) * rows["pool"]).sum(1)
            return pooled, following
        if aligned:
            windows = {name: v.reshape(v.shape[0], -1, size, v.shape[-1]) for name, v in new.items()}
        else:
            windows = {name: torch.stack([v[:, t : t + size] for t in range(length)], 1) for name, v in rows.items()}
        return (windows["pool_logits"].softmax(2) * windows["pool"]).sum(2), following

    @property
    def pools(self) -> bool:
        """Whether `forward` takes slots in exported graphs: the networks that run as standard operators do not."""
        return self.spec.fused

    def _chunk_gates(self, pooled: Tensor, aligned: bool) -> dict[str, Tensor]:
        """Each gate, (B, heads, T) or (B, heads, T, size), with a chunk's values repeated for all of its tokens."""
        options = self.options
        batch, count = pooled.shape[0], 1 if pooled.dim() == 2 else pooled.shape[1]
        raw = self.gates(pooled if pooled.dim() == 2 else flat(pooled))
        sizes = {name: size for name, size in self.gate_sizes.items() if size}
        if self.spec.fused:
            raw = torch.sigmoid(raw)  # of all gates at once; the exporter rejects it in the branches of other networks
        repeated = aligned and self.spec.chunk_size > 1
        single = count == 1 and not repeated and self.spec.fused
        if single:
            # For a single row, gates of size 1 are (B, heads, 1) as they are.
            split = raw.reshape(batch, options.heads, -1).split(list(sizes.values()), -1)
            parts = dict(zip(sizes, split, strict=True))
        else:
            rows = (options.heads, 1) if count == 1 else (count, options.heads)
            raw = raw.reshape(batch, *rows, -1)
            raw = raw if count == 1 else raw.transpose(1, 2)
            if repeated:
                raw = raw.unsqueeze(3).expand(-1, -1, -1, self.spec.chunk_size, -1)
                raw = raw.reshape(batch, options.heads, count * self.spec.chunk_size, -1)
            parts = dict(zip(sizes, raw.split(list(sizes.values()), -1), strict=True))
        scalar = {"forget", "previous_gate"} | ({"momentum"} if self.spec.momentum_order == 1 else set())
        for name, part in parts.items():
            if single and name not in scalar:
                parts[name] = part.unsqueeze(2)
            elif not single and name in scalar:
                parts[name] = part.squeeze(-1)
        gates = parts if self.spec.fused else {name: torch.sigmoid(part) for name, part in parts.items()}
        if "modulation" in gates and options.max_mem_layer_modulation != 1:
            gates["modulation"] = gates["modulation"] * options.max_mem_layer_modulation
        if "combine" in gates:
            gates["combine"] = parts["combine"].softmax(-1)
        return gates

    def forward(
        self,
        views: tuple[Tensor, Tensor, Tensor],
        state: StreamState,
        position: Tensor,
        learn: Tensor | None,
        aligned: bool,
        previous: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, StreamState, ChunkUpdate]:
        """views: the inputs of queries, keys and values, (B, T, dim) each. position: (B,) int64, of the first row.
        aligned: the call starts at a chunk's start and holds whole chunks.
        previous: (B, heads, N, |W|), the previous layer's weights before each chunk that the call may complete.
        slots: (B,) int64, the row of each stream in the state's pools; None if stream b has row b.

        Returns (B, T, dim), the next state, and the memory's update.
        """
        options = self.options
        heads, u, inner = options.heads, options.num_kv_per_token, options.dim_head * options.heads
        xq, xk, xv = views
        same = xk is xv
        if self.retrieve_norm is not None and self.store_norm is not None:
            xq = rms_norm(xq, self.retrieve_norm)
            xk = rms_norm(xk, self.store_norm)
            xv = xk if same else rms_norm(xv, self.store_norm)
        act = ACTIVATIONS[options.activation] if options.activation else None
        batch, length, dim = xq.shape
        q, *retrieve_gate = self.query(xq).split([inner, heads] if heads > 1 else [inner], -1)
        k, steps, *logits = self.key(flat(xk)).split([size for size in self.key_sizes if size], -1)
        v = self.value(xv)
        q, k, v = (act(t) if act else t for t in (q, k, v))
        q, k, v = self._heads(q, length, 1), self._heads(k, length, u), self._heads(v, length, u)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if length > 1:
            steps = steps.reshape(batch, length, heads, u).transpose(1, 2)
        theta = torch.sigmoid(steps.reshape(batch, heads, length * u))
        pooled, pools = self._pool(xk, logits[0].reshape(batch, length, dim) if logits else None, state, aligned, slots)
        gates = self._chunk_gates(pooled, aligned)
        result = chunk_memory_update(
            self.spec,
            ChunkInputs(
                rows=state["memory"],
                q=q,
                k=k,
                v=v,
                step_size=theta * options.default_step_transform_max_lr,
                momentum=gates.get("momentum"),
                forget=gates["forget"],
                modulation=gates.get("modulation"),
                combine=gates.get("combine"),
                previous=previous,
                previous_gate=gates.get("previous_gate"),
                transition=None if self.transition is None else torch.sigmoid(self.transition),
            ),
            position,
            learn,
            aligned,
            slots,
        )
        y = result.y if self.post_norm is None else self.post_norm(result.y)
        if self.out is not None:
            y = y * per_head(torch.sigmoid(retrieve_gate[0]))
            y = self.out(join_heads(y))
        else:
            y = join_heads(y)
        return y, {**pools, "memory": result.state}, result
