"""MAG: memory as a gate on sliding-window attention (equations 26 to 28).

o = y (x) M(x). Attention and memory read the same input. Both outputs are normalised with learned weights, and the
memory's goes through a sigmoid. For persistent tokens see mal.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import SlidingWindowAttention
from .config import ModelConfig
from .layers import FeedForward, Linear, RMSNorm, Step, StreamState
from .memory_layer import MemoryLayer


class Gating(nn.Module):
    """The gate of equations 25 and 28: norm(y) * sigmoid(norm(m)), then an output projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_memory = RMSNorm(dim), RMSNorm(dim)
        self.out = Linear(dim, dim)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm_attention(attended) * torch.sigmoid(self.norm_memory(remembered)))
        return out


class MAGBlock(nn.Module):
    """x + gating(attention(x), M(x)), then x + FFN(x). A block without a memory has plain attention."""

    def __init__(self, config: ModelConfig, memory: bool) -> None:
        super().__init__()
        dim = config.dim
        self.memory = MemoryLayer(dim, config.memory) if memory else None
        self.gating = Gating(dim) if memory else None
        self.norm = RMSNorm(dim)
        self.attention = SlidingWindowAttention(dim, config.attention_heads, config.window, config.persistent)
        self.norm_ff, self.ff = RMSNorm(dim), FeedForward(dim, config.hidden)

    def initial_state(self, batch: int) -> StreamState:
        memory = self.memory.initial_state(batch) if self.memory else {}
        return {**memory, **self.attention.initial_state(batch)}

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        normed = self.norm(x)
        y, cache = self.attention(normed, state, step)
        if self.memory is not None and self.gating is not None:
            m, state = self.memory(normed, state, step)
            y = self.gating(y, m)
        x = x + y
        return x + self.ff(self.norm_ff(x)), {**state, **cache}
