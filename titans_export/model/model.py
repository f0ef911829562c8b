"""A Titans language model of any variant: embedding, blocks and head. Runs in parallel or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .exported import repeated
from .layers import Linear, RMSNorm, Step, StreamState
from .lmm import LMMBlock
from .mac import MACBlock
from .mag import MAGBlock
from .mal import MALBlock
from .neural_memory import memory_layout
from .stream import Call, Graph, StateInfo, StreamModel, TensorSpec

ROLES = {"memory": "memory", "conv": "conv", "context_conv": "conv", "keys": "cache", "values": "cache"}
BLOCKS = {"lmm": LMMBlock, "mac": MACBlock, "mag": MAGBlock, "mal": MALBlock}


def _repeated_layer(
    kind: str, layer: nn.Module, x: Tensor, state: StreamState, step: Step
) -> tuple[Tensor, StreamState]:
    """layer(x, state, step), traced once for all layers of the kind. The next state has the shapes of the state."""
    names = list(state)

    given = {"learn": step.learn, "slots": step.slots}
    optional = {name: value for name, value in given.items() if value is not None}

    def run(module: nn.Module, x: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        others = dict(zip(optional, rest[len(names) :], strict=True))
        at = Step(position, others.get("learn"), step.aligned, others.get("slots"))
        y, following = module(x, dict(zip(names, rest, strict=False)), at)
        return y, *(following[name] for name in names)

    values = [state[name] for name in names]
    inputs = [x, step.position, *values, *optional.values()]
    y, *following = repeated(kind, layer, run, inputs, [x.shape, *(value.shape for value in values)])
    return y, dict(zip(names, following, strict=True))


class Titans(StreamModel):
    """The model that a `ModelConfig` describes.

    `forward` serves training: whole sequences from a new memory. `step` advances streams by whole chunks or one token
    and returns their next state. `feed` advances them by any number of tokens. All three give equal outputs.
    """

    pools = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.name, self.variant = config, config.name, config.variant
        self.input = TensorSpec("tokens", "tokens", config.vocab_size)
        self.output = TensorSpec("logits", "logits", config.vocab_size)
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        block = BLOCKS[config.variant]
        self.layers = nn.ModuleList(block(config, config.has_memory(i)) for i in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocab_size)

    def config_json(self) -> dict[str, Any]:
        return self.config.to_json()

    def graphs(self, chunks_per_call: int) -> list[Graph]:
        """Graphs for prefill by `chunks_per_call` chunks, prefill by one chunk, and decoding by one token."""
        chunk = self.config.memory.chunk
        graphs = [Graph("decode", 1)]
        if chunk > 1:
            graphs.insert(0, Graph("chunk", chunk, chunk))
        if chunks_per_call > 1:
            graphs.insert(0, Graph("prefill", chunks_per_call * chunk, chunk))
        return graphs

    def state_info(self) -> dict[str, StateInfo]:
        layout, facts = memory_layout(self.config.memory.spec).fields, {}
        for name in self.initial_state(1):
            role = ROLES[name.rsplit(".", 1)[-1]]
            written = None
            if role == "cache":
                first, period = self.config.persistent, self.config.window
                rings = [first, first + period] if self.config.variant == "mac" else [first]
                written = {"axis": 2, "first": rings, "period": period}
            if role == "memory":
                chunk = self.config.memory.chunk
                facts[name] = StateInfo(role, layout, chunk=chunk, operator="NeuralMemory")
            else:
                facts[name] = StateInfo(role, written=written)
        return facts

    def initial_state(self, batch: int) -> StreamState:
        """State of `batch` new streams by name, such as "layers.0.memory". The batch is the first dimension."""
        state: StreamState = {}
        for i, layer in enumerate(self.layers):
            own: StreamState = layer.initial_state(batch)  # type: ignore[operator]  # ModuleList forgets the class
            state |= {f"layers.{i}.{name}": value for name, value in own.items()}
        return state

    def call(self, inputs: Tensor, state: StreamState, call: Call) -> tuple[Tensor, StreamState]:
        return self.step(inputs, state, Step(call.position, call.learn, call.graph.tokens > 1, call.slots))

    def completing_tokens(self, graph: Graph, position: int) -> tuple[bool, ...]:
        return ((position + 1) % self.config.memory.chunk == 0,)

    def step(self, tokens: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """tokens: (B, T) int64, with T as `step` requires. Returns logits (B, T, vocab) and the next state; row t
        predicts the token after t.
        """
        x = F.embedding(tokens, self.embedding)
        following: StreamState = {}
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            kind = f"layer{int(self.config.has_memory(i))}"
            x, own = _repeated_layer(kind, layer, x, own, step)
            following |= {prefix + name: value for name, value in own.items()}
        return self.head(self.norm(x)), following

    def forward(self, tokens: Tensor, learn: bool = True, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """Logits of whole sequences, each from a new memory. tokens: (B, T) int64, T >= 1.

        learn: False freezes the memory. rows: positions to return, None for all. Returns (B, T or len(rows), vocab).
        """
        batch, length = tokens.shape
        padded = F.pad(tokens, (0, -length % self.config.memory.chunk))
        position = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        learning = None if learn else torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        logits, _ = self.step(padded, self.initial_state(batch), Step(position, learning, aligned=True))
        return logits[:, :length] if rows is None else logits[:, rows]
