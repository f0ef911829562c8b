"""Trains the byte-level MAC model of examples/checkpoints/mac-bytes on text.

    python examples/train/train_bytes.py --data book.txt -o out/

The last tenth of the first file is held out. Each row of a batch is one stream that keeps its memory between windows.
The model therefore learns with a memory that has read far more than one window.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from trainer import Settings, Task, train

from titans_export.model import MemoryConfig, ModelConfig, Step, Titans

CONFIG = ModelConfig(
    name="mac-bytes",
    variant="mac",
    vocab_size=256,
    dim=128,
    layers=4,
    hidden=384,
    memory=MemoryConfig(heads=4, head_dim=32, chunk=64),
    memory_layers=(1, 3),
    attention_heads=4,
    window=256,
    persistent=8,
)
GATE_BIASES = (-1.0, -2.0, -4.0)  # step size, momentum, forget gate
HELD_OUT = 0.1


class Streams(Task):
    """Rows of a batch as endless streams: window after window of text, with an occasional restart elsewhere."""

    def __init__(
        self, model: Titans, data: Tensor, seed: int, batch: int, window: int, windows: int, learn: bool
    ) -> None:
        self.model, self.data, self.seed = model, data, seed
        self.batch, self.window, self.windows, self.learn = batch, window, windows, learn
        self.start = torch.zeros(batch, dtype=torch.int64)
        self.position = torch.zeros(batch, dtype=torch.int64)
        self.memory: dict[str, Tensor] = {}

    def _restart(self, step: int) -> Tensor:
        """Rows that restart at this step, staggered so that a batch holds streams of all ages."""
        row = torch.arange(self.batch)
        return (step + row * self.windows // self.batch) % self.windows == 0 if step else torch.ones_like(row) > 0

    def loss(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        fresh = self._restart(step)
        room = len(self.data) - self.window * self.windows - 1
        start = torch.randint(max(room, 1), (self.batch,), generator=draw)
        self.start = torch.where(fresh, start, self.start)
        self.position = torch.where(fresh, 0, self.position)
        state = self.model.initial_state(self.batch)
        if self.memory:
            pick = fresh.view(-1, 1)
            kept = self.memory
            state = {n: torch.where(pick.view(-1, *[1] * (v.ndim - 1)), v, kept[n]) for n, v in state.items()}
        offset = (self.start + self.position) % (len(self.data) - self.window - 1)
        text = self.data[offset.unsqueeze(-1) + torch.arange(self.window + 1)].long()
        learn = None if self.learn else torch.zeros(self.batch, dtype=torch.bool)
        logits, state = self.model.step(text[:, :-1], state, Step(self.position, learn, aligned=True))
        self.memory = {name: value.detach() for name, value in state.items()}
        self.position = self.position + self.window
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    def state(self) -> dict[str, Any]:
        return {"start": self.start, "position": self.position, "memory": self.memory}

    def restore(self, state: dict[str, Any]) -> None:
        self.start, self.position, self.memory = state["start"], state["position"], state["memory"]


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), multiple=True, required=True)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", default=1450, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--window", default=512, show_default=True, help="Tokens per step; a multiple of the chunk.")
@click.option("--windows", default=16, show_default=True, help="Windows before a stream is reset.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--learn/--frozen", default=True, help="Train with a learning or a frozen memory.")
@click.option("--memory-depth", default=1, show_default=True)
def main(
    data: tuple[Path, ...],
    output: Path,
    steps: int,
    batch: int,
    window: int,
    windows: int,
    seed: int,
    threads: int,
    learn: bool,
    memory_depth: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    texts = [path.read_bytes() for path in data]
    kept = texts[0][: int(len(texts[0]) * (1 - HELD_OUT))]
    stream = torch.frombuffer(bytearray(b"".join([kept, *texts[1:]])), dtype=torch.uint8)
    model = Titans(replace(CONFIG, memory=replace(CONFIG.memory, depth=memory_depth)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gates.bias"):
                parameter.copy_(torch.tensor(GATE_BIASES).repeat_interleave(CONFIG.memory.heads))
    record = {
        "script": "examples/train/train_bytes.py",
        "data": [{"name": p.name, "sha256": hashlib.sha256(t).hexdigest()} for p, t in zip(data, texts, strict=True)],
        "held_out": "the last tenth of the first file",
        "batch": batch,
        "window": window,
        "windows": windows,
        "learn": learn,
    }
    settings = Settings(output, steps, seed, matrix_learning_rate=0.02, warmup=30, record=record)
    train(model, settings, lambda m: Streams(m, stream, seed, batch, window, windows, learn))


if __name__ == "__main__":
    main()
