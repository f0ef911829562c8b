"""MAL: memory as a layer, before sliding-window attention (equations 29 to 31).

The persistent tokens of equation 29 precede the attention window only. In front of the memory they would only set its
initial weights, which are learned anyway.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention import SlidingWindowAttention
from .config import ModelConfig
from .layers import FeedForward, RMSNorm, Step, StreamState
from .memory_layer import MemoryLayer


class MALBlock(nn.Module):
    """x + M(x), then x + attention(x), then x + FFN(x). A block without a memory omits the first step."""

    def __init__(self, config: ModelConfig, memory: bool) -> None:
        super().__init__()
        dim = config.dim
        self.memory = MemoryLayer(dim, config.memory) if memory else None
        self.norm_memory = RMSNorm(dim) if memory else None
        self.norm_attention = RMSNorm(dim)
        self.attention = SlidingWindowAttention(dim, config.attention_heads, config.window, config.persistent)
        self.norm_ff, self.ff = RMSNorm(dim), FeedForward(dim, config.hidden)

    def initial_state(self, batch: int) -> StreamState:
        memory = self.memory.initial_state(batch) if self.memory else {}
        return {**memory, **self.attention.initial_state(batch)}

    def forward(self, x: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        if self.memory is not None and self.norm_memory is not None:
            y, state = self.memory(self.norm_memory(x), state, step)
            x = x + y
        y, cache = self.attention(self.norm_attention(x), state, step)
        x = x + y
        return x + self.ff(self.norm_ff(x)), {**state, **cache}
