"""A memory layer: projects tokens to q, k, v and gates, runs the memory, and projects back (sections 3.1 and 4.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .layers import CausalConv, Linear, RMSNorm, Step, StreamState, join_heads, split_heads, unit
from .neural_memory import initial_rows, memory_read, memory_update


class MemoryLayer(nn.Module):
    """`heads` memory networks over a stream (B, T, dim). The input updates the memory and then reads it.

    k, v and q go through a causal convolution and SiLU; q and k are l2-normalised. The retrieval is normalised per head
    and gated. With `context`, `retrieve` reads the memory at the chunk's start for other tokens (MAC, equation 21).
    """

    def __init__(self, dim: int, config: MemoryConfig, context: bool = False) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec
        inner = config.heads * config.head_dim
        self.qkv = Linear(dim, 3 * inner)
        self.conv = CausalConv(3 * inner, config.conv, "silu")
        self.gates = Linear(dim, 3 * config.heads, bias=True)
        self.norm = RMSNorm(config.heads, config.head_dim)
        self.out_gate = Linear(dim, inner)
        self.out = Linear(inner, dim)
        self.initial = nn.ParameterList(torch.zeros(config.heads, i, o) for i, o in self.spec.shapes)
        self.norm_scale = nn.Parameter(torch.ones(config.heads, config.head_dim)) if config.layer_norm else None
        if context:
            self.context_query = Linear(dim, inner)
            self.context_conv = CausalConv(inner, config.conv, "silu")
            self.context_norm = RMSNorm(config.heads, config.head_dim)
            self.context_out = Linear(inner, dim)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        nn.init.normal_(self.gates.weight, std=0.02)
        assert self.gates.bias is not None
        step, momentum, forget = self.gates.bias.chunk(3)
        for part, value in ((step, 0.0), (momentum, -2.0), (forget, -6.0)):
            part.fill_(value)
        if self.spec.depth > 1:
            for w in self.initial:
                nn.init.normal_(w, std=w.shape[-2] ** -0.5)

    def initial_state(self, batch: int) -> StreamState:
        rows = initial_rows(self.spec, list(self.initial))
        state = {"memory": rows.expand(batch, -1, -1), "conv": self.conv.initial_state(batch)}
        if hasattr(self, "context_conv"):
            state["context_conv"] = self.context_conv.initial_state(batch)
        return state

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step size, momentum and forget gate, each (B, heads, T)."""
        assert self.gates.bias is not None
        # sigmoid(-momentum) is 1 - eta. The factor keeps the steps that momentum sums over a chunk below step_limit.
        weight = torch.cat([self.gates.weight, -self.gates.weight.chunk(3, -1)[1]], -1)
        bias = torch.cat([self.gates.bias, -self.gates.bias.chunk(3)[1]])
        gates = torch.sigmoid(x @ weight + bias)
        gates = gates.reshape(gates.shape[0], -1, 1) if gates.shape[1] == 1 else gates.transpose(1, 2)
        step, momentum, forget, rest = gates.chunk(4, 1)
        return step * rest * (self.config.step_limit / self.config.chunk), momentum, forget

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """Updates the memory with x (B, T, dim) and reads W_t for token t. Returns (B, T, dim) and the next state."""
        qkv, conv = self.conv(self.qkv(x), state["conv"], step.slots)
        heads = self.config.heads
        qk, v = split_heads(qkv, 3 * heads).split([2 * heads, heads], 1)
        q, k = unit(qk).chunk(2, 1)
        y, rows = memory_update(self.spec, state["memory"], q, k, v, self._gates(x), step, norm_scale=self.norm_scale)
        out: Tensor = self.out(join_heads(self.norm(y)) * F.silu(self.out_gate(x)))
        return out, {**state, "memory": rows, "conv": conv}

    def context_queries(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """The queries of equation 21 for x (B, T, dim). Returns (B, heads, T, D) and the next state."""
        q, conv = self.context_conv(self.context_query(x), state["context_conv"], step.slots)
        return unit(split_heads(q, self.config.heads)), {**state, "context_conv": conv}

    def retrieve(self, q: Tensor, state: StreamState, step: Step) -> Tensor:
        """h of equation 21, (B, T, dim), read from the memory at the open chunk's start. Nothing is updated."""
        y = memory_read(self.spec, state["memory"], q, step.slots, norm_scale=self.norm_scale)
        out: Tensor = self.context_out(join_heads(self.context_norm(y)))
        return out
