"""MemoryAsContextTransformer of titans-pytorch 0.5 as a stream of tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunk_neural_memory import ChunkUpdate
from ..chunk_update import ChunkMemorySpec, chunk_weights
from ..hyper_connection import hyper_connection
from ..layers import Linear, StreamState, flat
from ..stream import Call, Graph, StateInfo, StreamModel, TensorSpec
from .attention import StreamAttention, Window, WindowRule
from .memory import NeuralMemoryLayer, rms_norm
from .options import TransformerOptions
from .positions import AxialPositions, PairRotary, first_row, quotient

MOST_ROWS = 1024  # per call; larger graphs are no faster
LONGEST_PERIOD = 1 << 16  # of start offsets, all of which the manifest lists


class Residuals:
    """The residual streams between layers: mixed (B, T, S, dim), and the last branch's output, not yet added."""

    def __init__(self, streams: Tensor, branch: Tensor | None = None, weight: Tensor | None = None) -> None:
        self.streams, self.branch, self.weight = streams, branch, weight

    def total(self) -> Tensor:
        """The sum over streams, (B, T, dim)."""
        x = self.streams.sum(2)
        if self.branch is None:
            return x
        share = 1 if self.weight is None else self.weight.sum(-1, keepdim=True)
        return x + share * self.branch


class Connection(nn.Module):
    """A hyper-connection around one branch, or a plain residual connection for one stream. adds: whether the branch's
    output is added to the streams.
    """

    def __init__(self, dim: int, streams: int, adds: bool = True) -> None:
        super().__init__()
        self.plain = streams == 1
        if not self.plain:
            self.projection = nn.Parameter(torch.zeros(dim, streams + 1 + adds))
            self.bias = nn.Parameter(torch.zeros(streams, streams + 1 + adds))

    def forward(self, x: Residuals) -> tuple[Tensor, Tensor, Tensor | None]:
        """The branch's input (B, T, dim), the mixed streams, and the weights of the branch's output in each stream."""
        if self.plain:
            added = x.streams if x.branch is None else x.streams + x.branch.unsqueeze(2)
            return added.squeeze(2), added, None
        return hyper_connection(x.streams, self.projection, self.bias, x.branch, x.weight)


class FeedForward(nn.Module):
    """RMSNorm, then (silu(g) a) W2 + b2 with [a, g] = x W1 + b1."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.up, self.down = Linear(dim, 2 * hidden, bias=True), Linear(hidden, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(flat(rms_norm(x, self.norm))).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y.reshape(x.shape)


class ViewSelector(nn.Module):
    """Mixes the inputs and outputs of earlier layers into the inputs of queries, keys and values, weighted per
    token.
    """

    def __init__(self, dim: int, choices: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.select = Linear(dim, 3 * choices, bias=True)

    def forward(self, x: Tensor, earlier: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, dim), the first choice; earlier: the other choices, (B, T, dim) each."""
        batch, length, dim = x.shape
        weights = self.select(flat(rms_norm(x, self.norm))).reshape(batch, length, 3, -1).softmax(-1)
        # Concatenation and a reshape, because stacking would cost one node per choice and view.
        choices = torch.cat([x, *earlier], -1).reshape(batch, length, -1, dim)
        q, k, v = (weights @ choices).reshape(batch, length, 3 * dim).chunk(3, -1)
        return q, k, v


class Layer(nn.Module):
    """Memory (in some layers), attention and feed-forward, each in its own connection. index counts from 1."""

    def __init__(self, options: TransformerOptions, index: int, memory: NeuralMemoryLayer | None, rule: WindowRule):
        super().__init__()
        dim, streams = options.dim, options.num_residual_streams
        self.gates_attention = options.neural_mem_gate_attn_output
        self.memory, self.memory_connection, self.selector = memory, None, None
        if memory is not None:
            self.memory_connection = Connection(dim, streams, adds=not self.gates_attention)
            if index > 1 and options.neural_memory_qkv_receives_diff_views:
                self.selector = ViewSelector(dim, 4 * (index - 1) + 1)
        self.attention_connection, self.ff_connection = Connection(dim, streams), Connection(dim, streams)
        self.attention = StreamAttention(options, rule, mixes=index > 1)
        self.ff = FeedForward(dim, options.ff_hidden)

    def initial_state(self, batch: int) -> StreamState:
        memory = {} if self.memory is None else self.memory.initial_state(batch)
        return {**memory, **self.attention.initial_state(batch)}

    def state_info(self) -> dict[str, StateInfo]:
        memory = {} if self.memory is None else self.memory.state_info()
        return {**memory, **self.attention.state_info()}


class _Shared:
    """Values that layers pass on within a call."""

    def __init__(self, call: Call, first: Tensor, count: int, aligned: bool, window: Window | None) -> None:
        self.call, self.first, self.count, self.aligned, self.window = call, first, count, aligned, window
        self.earlier: list[Tensor] = []  # inputs and outputs of attention and feed-forward
        self.values: Tensor | None = None  # those of the first layer
        self.previous: tuple[ChunkMemorySpec, ChunkUpdate] | None = None


class MemoryAsContext(StreamModel):
    """The transformer.

    decoded_from: None computes the training forward at every position. A number is the prompt's length in tokens. After
    the prompt, results then match the library's cached decoding, including its deviations (persistent keys, the second
    chunk's weight residual, segmented caches).
    """

    variant = "titans-pytorch-mac"

    def __init__(self, options: TransformerOptions, name: str = "titans-pytorch", decoded_from: int | None = None):
        super().__init__()
        self.options, self.name, self.decoded_from = options, name, decoded_from
        dim, streams = options.dim, options.num_residual_streams
        self.input = TensorSpec("tokens", "tokens", options.num_tokens)
        self.output = TensorSpec("logits", "logits", options.num_tokens)
        self.row_segment = options.segment_len + options.num_longterm_mem_tokens
        self.decoded_row = None if decoded_from is None else self._rows_of(decoded_from)
        self.embedding = nn.Parameter(torch.zeros(options.num_tokens, dim))
        self.longterm = nn.Parameter(torch.zeros(options.num_longterm_mem_tokens, dim))
        self.positions = AxialPositions(dim, options.memory.chunk_size)
        self.stream_embedding = nn.Parameter(torch.zeros(streams, dim)) if streams > 1 else None
        rule = WindowRule(
            self.row_segment,
            options.sliding_window_attn,
            options.num_persist_mem_tokens,
            options.heads,
            1 + options.num_longterm_mem_tokens,
            self.decoded_row,
        )
        self.rule = rule
        self.layers = nn.ModuleList()
        memories = 0
        for index in range(1, options.depth + 1):
            memory = None
            if index in options.neural_memory_layers:
                memory = NeuralMemoryLayer(options.memory_of(first=memories == 0))
                memories += 1
            self.layers.append(Layer(options, index, memory, rule))
        self.norm = nn.Parameter(torch.ones(dim))
        self.head = Linear(dim, options.num_tokens)
        memories_in_pools = all(m.pools for m in self.modules() if isinstance(m, NeuralMemoryLayer))
        self.pools = rule.spec is not None and memories_in_pools

    def _rows_of(self, tokens: int) -> int:
        """Rows that the library uses for a prompt of this many tokens. No longterm rows follow the last token."""
        return tokens + (tokens - 1) // self.options.segment_len * self.options.num_longterm_mem_tokens

    def config_json(self) -> dict[str, Any]:
        extra = {} if self.decoded_from is None else {"bug_compatible_after": self.decoded_from}
        return {"class": "MemoryAsContextTransformer", **asdict(self.options), **extra}

    def graphs(self, chunks_per_call: int) -> list[Graph]:
        """Returns a block graph and decode graphs. A block holds whole segments whose rows are whole chunks, or a part
        of a segment if such blocks are too long. The last token of a segment has its own decode graph if longterm rows
        follow it.
        """
        segment, longterm = self.options.segment_len, self.options.num_longterm_mem_tokens
        block = math.lcm(self.row_segment, self.options.memory.chunk_size) // self.row_segment
        graphs = [Graph("decode", 1)]
        if longterm:
            graphs = [Graph("segment_end", 1, segment, (segment - 1,))]
            if segment > 1:
                graphs.append(Graph("decode", 1, segment, tuple(range(segment - 1))))
        tokens = block * segment
        if tokens > 1 and block * self.row_segment <= MOST_ROWS:
            graphs.insert(0, Graph("segment", tokens, tokens))
            if chunks_per_call > 1 and chunks_per_call * block * self.row_segment <= MOST_ROWS:
                graphs.insert(0, Graph("prefill", chunks_per_call * tokens, tokens))
        elif part := self._part(tokens):
            graphs.insert(0, part)
        return graphs

    def _part(self, period: int) -> Graph | None:
        """Graph of whole chunks within a segment, for segments too long for one call. period: tokens after which the
        offsets repeat.
        """
        segment, longterm, chunk = (
            self.options.segment_len,
            self.options.num_longterm_mem_tokens,
            self.options.memory.chunk_size,
        )
        inside = segment - bool(longterm)  # longterm rows follow the last token
        tokens = min(inside, MOST_ROWS // 4) // chunk * chunk
        if tokens < 2 or period > LONGEST_PERIOD:
            return None
        starts = [t for t in range(period) if t % segment + tokens <= inside]
        offsets = tuple(t for t in starts if (t + longterm * (t // segment)) % chunk == 0)
        return Graph("part", tokens, period, offsets) if offsets else None

    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        longterm = self.options.num_longterm_mem_tokens
        first = position + longterm * (position // self.options.segment_len)
        rows = 1 if graph.name == "decode" else 1 + longterm
        return tuple((first + row + 1) % self.options.memory.chunk_size == 0 for row in range(rows))

    def initial_state(self, batch: int) -> StreamState:
        state: StreamState = {}
        for i, layer in enumerate(self.layers):
            own: StreamState = layer.initial_state(batch)  # type: ignore[operator]  # ModuleList forgets the class
            state |= {f"layers.{i}.{name}": value for name, value in own.items()}
        return state

    def state_info(self) -> dict[str, StateInfo]:
        facts: dict[str, StateInfo] = {}
        for i, layer in enumerate(self.layers):
            own: dict[str, StateInfo] = layer.state_info()  # type: ignore[operator]
            facts |= {f"layers.{i}.{name}": value for name, value in own.items()}
        if not self.options.num_longterm_mem_tokens:
            return facts
        rows = {"segment": self.options.segment_len, "longterm": self.options.num_longterm_mem_tokens}
        counts = {name for name, value in facts.items() if value.written or value.chunk}
        return {name: replace(value, rows=rows) if name in counts else value for name, value in facts.items()}

    def _embed(self, tokens: Tensor, call: Call) -> Tensor:
        """Embeds tokens (B, T) into rows (B, R, dim), with the longterm rows in place."""
        segment, longterm = self.options.segment_len, self.options.num_longterm_mem_tokens
        x = F.embedding(tokens, self.embedding)
        batch, length, dim = x.shape
        if not longterm or call.graph.name in ("decode", "part"):
            return x
        mems = self.longterm.expand(batch, -1, -1)
        if length == 1:
            return torch.cat([x, mems], 1)
        x = x.reshape(batch, -1, segment, dim)
        mems = mems.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        return torch.cat([x, mems], 2).reshape(batch, -1, dim)

    def _token_rows(self, x: Tensor, length: int) -> Tensor:
        """Selects the token rows: (B, length, dim)."""
        if x.shape[1] == length:
            return x
        if length == 1:
            return x[:, :1]
        segment = self.options.segment_len
        x = x.reshape(x.shape[0], -1, self.row_segment, x.shape[-1])[:, :, :segment]
        return x.reshape(x.shape[0], length, -1)

    def _memory(
        self, layer: Layer, x: Residuals, state: StreamState, shared: _Shared
    ) -> tuple[Residuals, Tensor | None, StreamState]:
        """The memory branch of a layer: the streams after it, the gate of attention's output, and the next state."""
        memory, connection = layer.memory, layer.memory_connection
        assert memory is not None and connection is not None
        given, mixed, weight = connection(x)
        views = (given, given, given) if layer.selector is None else layer.selector(given, shared.earlier)
        previous = None
        if memory.options.accept_weight_residual:
            assert shared.previous is not None
            previous = self._previous(*shared.previous, memory.spec, shared)
        retrieved, state, update = memory(
            views, state, shared.first, shared.call.learn, shared.aligned, previous, shared.call.slots
        )
        if self.options.neural_mem_weight_residual:
            shared.previous = memory.spec, update
        if layer.gates_attention:
            return x, torch.sigmoid(retrieved), state
        return Residuals(mixed, retrieved, weight), None, state

    def _previous(self, spec: ChunkMemorySpec, update: ChunkUpdate, own: ChunkMemorySpec, shared: _Shared) -> Tensor:
        """The previous memory layer's weights before each chunk. The library's decoding uses the weights after it for
        the second chunk of a stream.
        """
        if self.decoded_row is None or self.decoded_row >= 2 * own.chunk_size:
            return update.initial_weights
        size = own.chunk_size
        slots = torch.arange(update.initial_weights.shape[2], device=shared.first.device)
        chunk = quotient(shared.first, size).unsqueeze(-1) + slots
        completed = quotient(shared.first % size + shared.count, size).unsqueeze(-1)
        last = chunk_weights(spec, update.state).unsqueeze(2)
        shifted = torch.cat([update.initial_weights[:, :, 1:], last], 2)
        after = torch.where((slots + 1 < completed)[:, None, :, None], shifted, last)
        return torch.where((chunk == 1)[:, None, :, None], after, update.initial_weights)

    def _layer(self, layer: Layer, x: Residuals, state: StreamState, shared: _Shared) -> tuple[Residuals, StreamState]:
        gate = None
        following: StreamState = {}
        if layer.memory is not None:
            own = {name: value for name, value in state.items() if name not in ("keys", "values")}
            x, gate, following = self._memory(layer, x, own, shared)
        given, mixed, weight = layer.attention_connection(x)
        attended, values, cache = layer.attention(
            given, state, shared.first, shared.window, shared.values, shared.call.slots
        )
        attended = attended if gate is None else attended * gate
        shared.values = values if shared.values is None else shared.values
        into_ff, mixed, ff_weight = layer.ff_connection(Residuals(mixed, attended, weight))
        y = layer.ff(into_ff)
        shared.earlier += [given, attended, into_ff, y]
        return Residuals(mixed, y, ff_weight), {**following, "keys": cache["keys"], "values": cache["values"]}

    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        options = self.options
        length = inputs.shape[1]
        aligned = call.graph.name in ("segment", "prefill", "part")
        x = self._embed(inputs, call)
        first = first_row(call.position, options.segment_len, options.num_longterm_mem_tokens)
        x = x + self.positions(first, x.shape[1], aligned)
        streams = x.unsqueeze(2)
        if self.stream_embedding is not None:
            streams = streams + self.stream_embedding
        rotary: PairRotary = self.layers[0].attention.rotary  # type: ignore[union-attr,assignment]
        shared = _Shared(call, first, x.shape[1], aligned, self.rule(first, x.shape[1], rotary))
        residuals = Residuals(streams)
        following: StreamState = {}
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            residuals, own = self._layer(layer, residuals, own, shared)  # type: ignore[arg-type]
            following |= {prefix + name: value for name, value in own.items()}
        x = self._token_rows(residuals.total(), length)
        return self.head(rms_norm(x, self.norm)), following
