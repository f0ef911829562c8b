"""MAC: memory as context (equations 21 to 25), made causal.

Each chunk takes these steps; the chunk size divides the segment. h is read from the memory at the chunk's start (21).
Attention sees persistent tokens, and h and tokens of the segment up to each token's own place (22, 23). Its output y
updates the memory (24), and o = y (x) M_t(y) (25). The paper reads h once per segment; smaller chunks read it more
recently.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .attention import SegmentAttention
from .config import ModelConfig
from .layers import FeedForward, RMSNorm, Step, StreamState
from .mag import Gating
from .memory_layer import MemoryLayer


def _pieces(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """Splits x into pieces of `size` along `dim`. A single piece is x itself, which avoids a Split node."""
    return (x,) if x.shape[dim] == size else x.split(size, dim)


class MACBlock(nn.Module):
    """x + o, then x + FFN(x). A block without a memory has plain segment attention with zeros as retrieved rows."""

    def __init__(self, config: ModelConfig, memory: bool) -> None:
        super().__init__()
        dim = config.dim
        self.chunk = config.memory.chunk
        self.memory = MemoryLayer(dim, config.memory, context=True) if memory else None
        self.gating = Gating(dim) if memory else None
        self.norm_memory = RMSNorm(dim) if memory else None
        self.norm = RMSNorm(dim)
        self.attention = SegmentAttention(dim, config.attention_heads, config.window, config.persistent)
        self.norm_ff, self.ff = RMSNorm(dim), FeedForward(dim, config.hidden)

    def initial_state(self, batch: int) -> StreamState:
        memory = self.memory.initial_state(batch) if self.memory else {}
        return {**memory, **self.attention.initial_state(batch)}

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        normed, out, at = self.norm(x), [], step
        size = self.chunk if step.aligned else 1
        queries: tuple[Tensor | None, ...] = (None,) * -(-x.shape[1] // size)
        if self.memory is not None:
            q, state = self.memory.context_queries(normed, state, step)
            queries = _pieces(q, size, -2)
        for x_c, normed_c, q_c in zip(_pieces(x, size, 1), _pieces(normed, size, 1), queries, strict=True):
            retrieved = None if self.memory is None or q_c is None else self.memory.retrieve(q_c, state, step)
            y, cache = self.attention(normed_c, retrieved, state, at)
            state = {**state, **cache}
            if self.memory is not None and self.gating is not None and self.norm_memory is not None:
                m, state = self.memory(self.norm_memory(x_c + y), state, step)
                y = self.gating(y, m)
            out.append(y)
            at = replace(at, position=at.position + size)
        x = x + torch.cat(out, 1)
        return x + self.ff(self.norm_ff(x)), state
