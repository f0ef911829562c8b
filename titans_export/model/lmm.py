"""LMM: the long-term memory without attention."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ModelConfig
from .layers import FeedForward, RMSNorm, Step, StreamState
from .memory_layer import MemoryLayer


class LMMBlock(nn.Module):
    """x + M(x), then x + FFN(x). A block without a memory has the second step only."""

    def __init__(self, config: ModelConfig, memory: bool) -> None:
        super().__init__()
        dim = config.dim
        self.memory = MemoryLayer(dim, config.memory) if memory else None
        self.norm_memory = RMSNorm(dim) if memory else None
        self.norm_ff, self.ff = RMSNorm(dim), FeedForward(dim, config.hidden)

    def initial_state(self, batch: int) -> StreamState:
        return self.memory.initial_state(batch) if self.memory else {}

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        if self.memory is not None and self.norm_memory is not None:
            y, state = self.memory(self.norm_memory(x), state, step)
            x = x + y
        return x + self.ff(self.norm_ff(x)), state
