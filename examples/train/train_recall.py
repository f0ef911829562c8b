"""Trains the model of examples/checkpoints/recall on the recall task of examples/recall_task.py.

    python examples/train/train_recall.py -o out/

Attention covers 32 tokens, and a key is queried hundreds of tokens after its pair, so only the memory can answer.
Episodes grow as the model learns. The first levels disable attention, because they take longer with it. In levels
marked `carried`, every row of a batch is one endless stream of episodes. There the model also learns to forget the
pairs of earlier episodes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer import Settings, Task, train

from titans_export.model import MemoryConfig, ModelConfig, Step, Titans
from titans_export.model.attention import Attention
from titans_export.model.layers import StreamState

sys.path.append(str(Path(__file__).resolve().parents[1]))
from recall_task import CHANCE, VOCAB_SIZE, episode_length, make_episodes

CONFIG = ModelConfig(
    name="recall",
    variant="mal",
    vocab_size=VOCAB_SIZE,
    dim=64,
    layers=2,
    hidden=128,
    memory=MemoryConfig(heads=2, head_dim=32, chunk=16),
    attention_heads=2,
    window=32,
)
GATE_BIASES = (3.0, -2.0, -6.0)  # step size, momentum, forget gate
PASS = 0.93  # running accuracy at which the next level begins
EVALUATION_SEED = 1_000_000  # training batches use [seed, step] with smaller numbers


class Level(NamedTuple):
    """The length of episodes, the batch size, and whether attention takes part.

    carried: each row continues from the previous step instead of a new memory.
    """

    pairs: int
    filler: int
    batch: int
    attention: bool = True
    carried: bool = False


LEVELS = (
    Level(4, 16, 32, attention=False),
    Level(8, 64, 32, attention=False),
    Level(8, 64, 16, carried=True),
    Level(16, 128, 16, carried=True),
    Level(16, 256, 16, carried=True),
    Level(32, 300, 16, carried=True),
)


@torch.no_grad()
def initialise(model: Titans) -> None:
    """Sets initial weights that differ from the model's defaults.

    Tokens are distinct from the first step on, steps are large, and a memory key starts as the previous token, so that
    values are written under their keys. With the default weights, 500 steps only reach guessing among the episode's
    values.
    """
    model.embedding.normal_()
    for name, parameter in model.named_parameters():
        if name.endswith("gates.bias"):
            parameter.copy_(torch.tensor(GATE_BIASES).repeat_interleave(CONFIG.memory.heads))
        elif name.endswith("memory.conv.weight"):
            parameter.mul_(0.1)
            q, k, v = parameter.chunk(3, 1)  # (width, heads * head_dim) each; the last tap is for the current token
            q[-1] += 1
            k[-2] += 1
            v[-1] += 1


@torch.no_grad()
def accuracy(model: Titans, pairs: int, filler: int, episodes: int, seed: int, learn: bool = True) -> float:
    """Share of right answers over new episodes, each from a new memory."""
    tokens, queries, answers = make_episodes(episodes, pairs, filler, [EVALUATION_SEED, seed])
    logits = model(torch.from_numpy(tokens), learn, torch.from_numpy(queries))
    return float((logits.argmax(-1).numpy() == answers).mean())


class Recall(Task):
    """Episodes of the current level. A level ends when the running accuracy exceeds `PASS`."""

    def __init__(self, model: Titans, seed: int) -> None:
        self.model, self.seed = model, seed
        self.level, self.right, self.position = 0, 0.0, 0
        self.memory: dict[str, Tensor] = {}
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(self._silence)

    def _silence(
        self, attention: nn.Module, inputs: Any, output: tuple[Tensor, StreamState]
    ) -> tuple[Tensor, StreamState]:
        y, state = output
        return (y if LEVELS[self.level].attention else torch.zeros_like(y)), state

    def loss(self, step: int) -> Tensor:
        level = LEVELS[self.level]
        # Pads with filler to a whole number of chunks; an episode's offset within its chunk is random.
        slack = -episode_length(level.pairs, level.filler) % self.model.config.memory.chunk
        lead = int(np.random.default_rng([self.seed, step, 1]).integers(slack + 1))
        filler = level.filler + slack - lead
        tokens, queries, answers = make_episodes(level.batch, level.pairs, filler, [self.seed, step], lead)
        state = self.memory or self.model.initial_state(level.batch)
        where = Step(torch.full((level.batch,), self.position), None, aligned=True)
        logits, state = self.model.step(torch.from_numpy(tokens), state, where)
        logits, wanted = logits[:, torch.from_numpy(queries)].flatten(0, 1), torch.from_numpy(answers).flatten()
        self.right = 0.95 * self.right + 0.05 * float((logits.argmax(-1) == wanted).float().mean())
        if level.carried:
            self.memory = {name: value.detach() for name, value in state.items()}
            self.position += tokens.shape[1]
        if self.right > PASS and self.level + 1 < len(LEVELS):
            self.level, self.right = self.level + 1, 0.0
        return F.cross_entropy(logits, wanted)

    def report(self) -> str:
        return f", {self.right:.1%} right at {LEVELS[self.level]}"

    def state(self) -> dict[str, Any]:
        return {"level": self.level, "right": self.right, "position": self.position, "memory": self.memory}

    def restore(self, state: dict[str, Any]) -> None:
        self.level, self.right, self.position, self.memory = (
            state[name] for name in ("level", "right", "position", "memory")
        )

    def result(self) -> dict[str, Any]:
        """Accuracy with a learning and a frozen memory, at every trained length."""
        rows = []
        for pairs, filler in sorted({level[:2] for level in LEVELS}):
            learning, frozen = (accuracy(self.model, pairs, filler, 64, seed=0, learn=on) for on in (True, False))
            rows.append({"pairs": pairs, "filler": filler, "learning": learning, "frozen": frozen})
        return {"accuracy": rows, "chance": CHANCE}


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", default=850, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(output: Path, steps: int, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = Titans(CONFIG)
    initialise(model)
    record = {"script": "examples/train/train_recall.py", "levels": [level._asdict() for level in LEVELS]}
    settings = Settings(output, steps, seed, decay_from=0.6, record=record)
    train(model, settings, lambda m: Recall(m, seed))


if __name__ == "__main__":
    main()
