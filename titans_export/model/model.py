"""A Titans language model of any variant: embedding, blocks, head; in parallel for training and as an exact stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Linear, RMSNorm, Step, StreamState
from .lmm import LMMBlock
from .mac import MACBlock
from .mag import MAGBlock
from .mal import MALBlock

BLOCKS = {"lmm": LMMBlock, "mac": MACBlock, "mag": MAGBlock, "mal": MALBlock}


class Titans(nn.Module):
    """The model that a `ModelConfig` describes.

    `forward` is what training uses: whole sequences from a fresh memory. `step` advances streams by whole chunks or by
    one token and returns their next state; `feed` advances them by any number of tokens. All three agree.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        block = BLOCKS[config.variant]
        self.layers = nn.ModuleList(block(config, config.has_memory(i)) for i in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocab_size)

    def initial_state(self, batch: int) -> StreamState:
        """State of `batch` fresh streams, by name: "layers.0.memory" and so on, batch first."""
        state: StreamState = {}
        for i, layer in enumerate(self.layers):
            own: StreamState = layer.initial_state(batch)  # type: ignore[operator]  # ModuleList forgets the class
            state |= {f"layers.{i}.{name}": value for name, value in own.items()}
        return state

    def step(self, tokens: Tensor, state: StreamState, step: Step) -> tuple[Tensor, StreamState]:
        """tokens: (B, T) int64, T as `step` says. Returns logits (B, T, vocab), row t following token t, and the
        state.
        """
        x = F.embedding(tokens, self.embedding)
        following: StreamState = {}
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            x, own = layer(x, own, step)
            following |= {prefix + name: value for name, value in own.items()}
        return self.head(self.norm(x)), following

    def forward(self, tokens: Tensor, learn: bool = True, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """Logits of whole sequences, each from a fresh memory. tokens: (B, T) int64, any T >= 1.

        learn: False freezes the memory. rows: the positions wanted, all if None. Returns (B, T or len(rows), vocab).
        """
        batch, length = tokens.shape
        padded = F.pad(tokens, (0, -length % self.config.memory.chunk))
        position = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        learning = None if learn else torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        logits, _ = self.step(padded, self.initial_state(batch), Step(position, learning, aligned=True))
        return logits[:, :length] if rows is None else logits[:, rows]

    @torch.no_grad()
    def feed(self, tokens: Tensor, state: StreamState, position: int, learn: bool = True) -> tuple[Tensor, StreamState]:
        """Streams on by any number of tokens, whole chunks at once where they start at one. tokens: (B, T), T >= 0.

        Returns logits (B, T, vocab) and the state at position + T.
        """
        batch, length = tokens.shape
        chunk, done, out = self.config.memory.chunk, 0, []
        learning = torch.full((batch,), learn, device=tokens.device)
        while done < length:
            aligned = (position + done) % chunk == 0 and length - done >= chunk
            size = chunk if aligned else 1
            where = torch.full((batch,), position + done, device=tokens.device)
            logits, state = self.step(tokens[:, done : done + size], state, Step(where, learning, aligned))
            out.append(logits)
            done += size
        return torch.cat(out, 1) if out else self.head.weight.new_zeros(batch, 0, self.config.vocab_size), state
