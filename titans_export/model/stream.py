"""What a model has to be, for export, verification and benchmarks, whatever format its checkpoint came in."""

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
    """A graph of the schedule: it consumes `tokens` tokens where position % stride is one of `offsets`."""

    name: str
    tokens: int
    stride: int = 1
    offsets: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class TensorSpec:
    """What goes in, or comes out, per token: token ids below `size`, logits or float vectors of width `size`."""

    kind: Literal["tokens", "logits", "vectors"]
    name: str
    size: int


@dataclass(frozen=True)
class StateInfo:
    """The manifest's entry of a state tensor beside its name and shape; the keys are those of docs/bundle.md.

    role: "memory", "conv" or "cache". layout: the fields of a packed memory row. written: the rows of a cache that a
    token writes. chunk: rows of a memory's chunk. rows: the rows of a stream, if they are not its tokens. operator:
    the operator that updates a memory.
    """

    role: str
    layout: tuple[LayoutField, ...] = ()
    written: dict[str, Any] | None = None
    chunk: int | None = None
    rows: dict[str, int] | None = None
    operator: str | None = None


@dataclass(frozen=True)
class Call:
    """One call of a graph. position: (B,) int64, tokens consumed before it; learn: (B,) bool, None for all True."""

    graph: Graph
    position: Tensor
    learn: Tensor | None = field(default=None)


class StreamModel(nn.Module, ABC):
    """A model that runs as a stream.

    Attributes: name; variant, such as "mac"; input and output, per token; config, as JSON.
    """

    name: str
    variant: str
    input: TensorSpec
    output: TensorSpec

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """The configuration, for the manifest."""

    @abstractmethod
    def graphs(self, chunks_per_call: int) -> list[Graph]:
        """The schedule, most tokens first. Every position has a graph of one token."""

    @abstractmethod
    def initial_state(self, batch: int) -> StreamState:
        """State of `batch` fresh streams by name, batch first."""

    @abstractmethod
    def state_info(self) -> dict[str, StateInfo]:
        """By the names of `initial_state`."""

    @abstractmethod
    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        """inputs: (B, T) int64 or (B, T, size) float. Returns outputs (B, T, size), row t after token t, and the state
        at position + T.
        """

    @abstractmethod
    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        """Of a call that is not aligned to chunks, whether each of its rows completes one: what an exported graph asks
        at run time. Of an aligned one: anything.
        """

    @torch.no_grad()
    def feed(self, inputs: Tensor, state: StreamState, position: int, learn: bool = True) -> tuple[Tensor, StreamState]:
        """Streams on by any number of tokens T >= 0, by the schedule. Returns (B, T, size) and the state there."""
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
