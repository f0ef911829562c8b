"""The interface of a model for export, verification and benchmarks, independent of its checkpoint format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..manifest import LayoutField
from ..schedule import calls
from .layers import StreamState


@dataclass(frozen=True)
class Graph:
    """A graph of the schedule. It consumes `tokens` tokens and may start where position % stride is in `offsets`."""

    name: str
    tokens: int
    stride: int = 1
    offsets: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output per token: a token id below `size`, or `size` logits, or a float vector of width `size`."""

    kind: Literal["tokens", "logits", "vectors"]
    name: str
    size: int


@dataclass(frozen=True)
class StateInfo:
    """The manifest's entry of a state tensor, without name and shape; docs/bundle.md defines the keys.

    role: "memory", "conv" or "cache".
    layout: fields of a packed memory row.
    written: cache rows that a token writes.
    chunk: rows per chunk of a memory.
    rows: rows of a stream, if they differ from its tokens.
    operator: the operator that updates a memory.
    """

    role: str
    layout: tuple[LayoutField, ...] = ()
    written: dict[str, Any] | None = None
    chunk: int | None = None
    rows: dict[str, int] | None = None
    operator: str | None = None


@dataclass(frozen=True)
class Call:
    """One call of a graph.

    position: (B,) int64, tokens consumed before it. learn: (B,) bool, None for all True. slots: (B,) int64, distinct,
    the row of each stream in the state's tensors, which then are pools (P, ...); None if stream b has row b.
    """

    graph: Graph
    position: Tensor
    learn: Tensor | None = field(default=None)
    slots: Tensor | None = field(default=None)


class StreamModel(nn.Module, ABC):
    """A model that runs as a stream.

    Attributes: name; variant, such as "mac"; input and output, per token; config, as JSON. pools: `call` takes slots,
    and its graphs take any number of streams.
    """

    pools: bool = False
    name: str
    variant: str
    input: TensorSpec
    output: TensorSpec

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """The configuration as stored in the manifest."""

    @abstractmethod
    def graphs(self, chunks_per_call: int) -> list[Graph]:
        """The schedule's graphs, in descending order of tokens. A decode graph covers every position."""

    @abstractmethod
    def initial_state(self, batch: int) -> StreamState:
        """State of `batch` new streams by name. The batch is the first dimension."""

    @abstractmethod
    def state_info(self) -> dict[str, StateInfo]:
        """Entries by the names of `initial_state`."""

    @abstractmethod
    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        """inputs: (B, T) int64 or (B, T, size) float. Returns outputs (B, T, size), row t for token t, and the state at
        position + T.
        """

    @abstractmethod
    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        """Whether each row of the call completes a chunk, for calls that are not aligned to chunks. An exported graph
        decides this at run time. The result is arbitrary for aligned calls.
        """

    @torch.no_grad()
    def feed(self, inputs: Tensor, state: StreamState, position: int, learn: bool = True) -> tuple[Tensor, StreamState]:
        """Advances streams by T >= 0 tokens along the schedule. Returns outputs (B, T, size) and the next state."""
        batch, length = inputs.shape[:2]
        out = []
        learning = torch.full((batch,), learn, device=inputs.device)
        for at, graph in calls(self.graphs(1), position, length):
            where = torch.full((batch,), at, device=inputs.device)
            part = inputs[:, at - position : at - position + graph.tokens]
            y, state = self.call(part, state, Call(graph, where, learning))
            out.append(y)
        if not out:
            like = next(self.parameters())
            return like.new_zeros(batch, 0, self.output.size), state
        return torch.cat(out, 1), state
