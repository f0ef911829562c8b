"""A bare NeuralMemory as a stream of vectors."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..layers import StreamState
from ..stream import Call, Graph, StateInfo, StreamModel, TensorSpec
from .memory import NeuralMemoryLayer
from .options import MemoryOptions

PREFIX = "memory."


class VectorMemory(StreamModel):
    """Takes (T, dim), or (T, 3 dim) with the views of queries, keys and values side by side. Returns (T, dim)."""

    variant = "neural-memory"

    def __init__(self, options: MemoryOptions, name: str = "neural-memory") -> None:
        super().__init__()
        self.options, self.name = options, name
        self.views = 3 if options.qkv_receives_diff_views else 1
        self.input = TensorSpec("vectors", "x", options.dim * self.views)
        self.output = TensorSpec("vectors", "y", options.dim)
        self.layer = NeuralMemoryLayer(options)
        self.pools = self.layer.pools

    def config_json(self) -> dict[str, Any]:
        return {"class": "NeuralMemory", **asdict(self.options)}

    def graphs(self, chunks_per_call: int) -> list[Graph]:
        size = self.options.chunk_size
        graphs = [Graph("decode", 1)]
        if size > 1:
            graphs.insert(0, Graph("chunk", size, size))
        if chunks_per_call > 1:
            graphs.insert(0, Graph("prefill", chunks_per_call * size, size))
        return graphs

    def initial_state(self, batch: int) -> StreamState:
        return {PREFIX + name: value for name, value in self.layer.initial_state(batch).items()}

    def state_info(self) -> dict[str, StateInfo]:
        return {PREFIX + name: facts for name, facts in self.layer.state_info().items()}

    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        return ((position + 1) % self.options.chunk_size == 0,)

    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        own = {name.removeprefix(PREFIX): value for name, value in state.items()}
        q, k, v = inputs.chunk(3, -1) if self.views == 3 else (inputs,) * 3
        aligned = call.graph.tokens > 1
        y, own, _ = self.layer((q, k, v), own, call.position, call.learn, aligned, slots=call.slots)
        return y, {PREFIX + name: value for name, value in own.items()}
