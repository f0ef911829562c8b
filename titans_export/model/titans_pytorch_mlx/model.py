"""Language models of titans-pytorch-mlx as streams. Each segment equals one call of the library's forward."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import FeedForward, Linear, RMSNorm, StreamState
from ..stream import Call, Graph, StateInfo, StreamModel, TensorSpec
from .attention import SegmentWindowAttention
from .memory import SegmentMemory
from .options import ModelOptions

PART = 64  # most tokens of the graph for parts of a segment


class Block(nn.Module):
    """Each step reads its input normed:

        lmm: x + M(x), then x + FFN(x)
        mal: x + M(x), then x + attention(x), then x + FFN(x)
        mag: y = x + attention(x), then o = y M(x), then o + FFN(o)

    The variants differ in the order of memory and attention.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        dim = options.dim
        self.options = options
        self.memory = SegmentMemory(options)
        self.attention = None
        if options.variant != "lmm":
            self.attention = SegmentWindowAttention(
                dim, options.heads, options.segment, options.window, options.persistent, options.rotary
            )
        self.norm_memory = RMSNorm(dim)
        # In mag, attention and memory share one normed input.
        self.norm_attention = RMSNorm(dim) if options.variant == "mal" else None
        self.norm_ff, self.ff = RMSNorm(dim), FeedForward(dim, options.hidden)

    def initial_state(self, batch: int) -> StreamState:
        cache = self.attention.initial_state(batch) if self.attention is not None else {}
        return {**self.memory.initial_state(batch), **cache}

    def state_info(self) -> dict[str, StateInfo]:
        cache = self.attention.state_info() if self.attention is not None else {}
        return {**self.memory.state_info(), **cache}

    def forward(
        self, x: Tensor, state: StreamState, place: Tensor | None, learn: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """place: (B,) int64, of the first token within its segment; None for whole segments."""
        normed = self.norm_memory(x)
        if place is None:
            m, following = self.memory.segments(normed, state, learn)
        else:
            m, following = self.memory.part(normed, state, place, learn)
        gates = self.options.variant == "mag"
        if not gates:
            x = x + m
        if self.attention is not None:
            normed = normed if self.norm_attention is None else self.norm_attention(x)
            if place is None:
                y, cache = self.attention.segments(normed)
            else:
                y, cache = self.attention.part(normed, state, place)
            x, following = x + y, {**following, **cache}
        if gates:
            x = x * m
        return x + self.ff(self.norm_ff(x)), following


class SegmentModel(StreamModel):
    """The model that a `ModelOptions` describes."""

    def __init__(self, options: ModelOptions, name: str = "titans") -> None:
        super().__init__()
        self.options, self.name, self.variant = options, name, options.variant
        self.input = TensorSpec("tokens", "tokens", options.vocab_size)
        self.output = TensorSpec("logits", "logits", options.vocab_size)
        self.embedding = nn.Parameter(torch.zeros(options.vocab_size, options.dim))
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = RMSNorm(options.dim)
        self.head = Linear(options.dim, options.vocab_size)

    def config_json(self) -> dict[str, Any]:
        return asdict(self.options)

    def graphs(self, chunks_per_call: int) -> list[Graph]:
        size = self.options.segment
        graphs = [Graph("decode", 1)]
        part = max(n for n in range(1, PART + 1) if size % n == 0)
        if 1 < part < size and size > PART:
            graphs.insert(0, Graph("part", part, part))
        if size > 1:
            graphs.insert(0, Graph("segment", size, size))
        if chunks_per_call > 1:
            graphs.insert(0, Graph("prefill", chunks_per_call * size, size))
        return graphs

    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        return ((position + graph.tokens) % self.options.segment == 0,)

    def _of_blocks(self) -> list[tuple[str, Block]]:
        return [(f"layers.{i}.", block) for i, block in enumerate(self.blocks) if isinstance(block, Block)]

    def initial_state(self, batch: int) -> StreamState:
        return {
            prefix + name: value
            for prefix, block in self._of_blocks()
            for name, value in block.initial_state(batch).items()
        }

    def state_info(self) -> dict[str, StateInfo]:
        return {
            prefix + name: facts for prefix, block in self._of_blocks() for name, facts in block.state_info().items()
        }

    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        size = self.options.segment
        place = None if call.graph.stride % size == 0 else torch.remainder(call.position, size)
        x = F.embedding(inputs, self.embedding)
        following: StreamState = {}
        for prefix, block in self._of_blocks():
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            x, own = block(x, own, place, call.learn)
            following |= {prefix + name: value for name, value in own.items()}
        return self.head(self.norm(x)), following
