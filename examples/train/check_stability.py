"""Runs a checkpoint over a very long stream while its memory learns, and records the size of its memory.

    python examples/train/check_stability.py examples/checkpoints/recall -o recall.json
    python examples/train/check_stability.py examples/checkpoints/mac-bytes --data book.txt -o mac-bytes.json

Without --data the stream is a sequence of recall episodes. Every `--every` tokens, a line records the maximum over the
interval of:

- max_y: the largest retrieval before any norm, because a norm would hide growth.
- w_norm, s_norm: the Frobenius norms of the fast weights and of their accumulated surprise, after each block.

It also records lambda_max of the interval's last block: the largest eigenvalue of sum_s A_s k_s k_s^T over a chunk.
This is half the factor by which a linear memory's update shrinks its weights; a contraction stays below 1.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from titans_export.checkpoints import titans
from titans_export.files import replacing_file
from titans_export.model import Step, Titans
from titans_export.model.layers import StreamState, split_heads, unit
from titans_export.model.memory import Gates, coefficients
from titans_export.model.memory_layer import MemoryLayer
from titans_export.model.neural_memory import memory_layout

sys.path.append(str(Path(__file__).resolve().parents[1]))
from recall_task import make_episodes

GROWTH = 2.0  # largest ratio of the last tenth of the lines to the first tenth


class Piece(NamedTuple):
    """Tokens of a stream and their targets, -1 for tokens without a target. Both (T,)."""

    tokens: NDArray[np.int64]
    wanted: NDArray[np.int64]


def recall_pieces(pairs: int, filler: int, seed: int) -> Iterator[Piece]:
    """An endless sequence of episodes."""
    number = 0
    while True:
        tokens, queries, answers = make_episodes(1, pairs, filler, [seed, number])
        wanted = np.full(tokens.shape[1], -1)
        wanted[queries] = answers[0]
        yield Piece(tokens[0], wanted)
        number += 1


def text_pieces(path: Path) -> Iterator[Piece]:
    """The bytes of a file, repeated endlessly."""
    text = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64)
    while True:
        yield Piece(text, np.roll(text, -1))


def blocks(pieces: Iterator[Piece], size: int) -> Iterator[Piece]:
    """Regroups the stream into blocks of `size` tokens."""
    tokens, wanted = (np.empty(0, dtype=np.int64) for _ in range(2))
    for piece in pieces:
        tokens, wanted = np.concatenate([tokens, piece.tokens]), np.concatenate([wanted, piece.wanted])
        whole = len(tokens) // size * size
        for start in range(0, whole, size):
            yield Piece(tokens[start : start + size], wanted[start : start + size])
        tokens, wanted = tokens[whole:], wanted[whole:]


@dataclass
class Watch:
    """The worst values since the last line, by layer name, and every memory's inputs of the last block."""

    model: Titans
    worst: dict[str, dict[str, float]] = field(default_factory=dict)
    inputs: dict[str, tuple[Tensor, StreamState]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, MemoryLayer)}
        for name, layer in self.layers.items():
            norms = [layer.norm] + ([layer.context_norm] if hasattr(layer, "context_norm") else [])
            for norm in norms:
                norm.register_forward_pre_hook(self._on_retrieval(name))
            layer.register_forward_pre_hook(self._on_update(name))

    def _on_retrieval(self, name: str) -> Any:
        def hook(norm: nn.Module, inputs: tuple[Tensor]) -> None:
            self.note("max_y", name, float(inputs[0].abs().max()))

        return hook

    def _on_update(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, StreamState, Step]) -> None:
            self.inputs[name] = inputs[:2]

        return hook

    def note(self, what: str, name: str, value: float) -> None:
        """Keeps the larger of two values. NaN persists."""
        old = self.worst.setdefault(what, {}).get(name, value)
        self.worst[what][name] = old if math.isnan(old) or old > value else value

    def after_block(self, state: StreamState) -> None:
        for name, layer in self.layers.items():
            fields = memory_layout(layer.spec).unpack(state[name])
            for what, letter in (("w_norm", "W"), ("s_norm", "S")):
                squares = [fields[f"{letter}{i}"].square().sum((-1, -2)) for i in range(layer.spec.depth)]
                self.note(what, name, float(torch.stack(squares).sum(0).sqrt().max()))

    def lambda_max(self) -> dict[str, float]:
        """By layer: the maximum over heads and over the chunks of the last call."""
        return {name: _lambda_max(self.layers[name], *inputs) for name, inputs in self.inputs.items()}


def _lambda_max(layer: MemoryLayer, x: Tensor, state: StreamState) -> float:
    chunk = layer.spec.chunk_size
    qkv, _ = layer.conv(layer.qkv(x), state["conv"])
    keys = unit(split_heads(F.silu(qkv.chunk(3, -1)[1]), layer.config.heads))
    largest = 0.0
    for k, gates in zip(keys.split(chunk, -2), Gates(*layer._gates(x)).chunks(chunk), strict=True):
        weights = coefficients(gates).a[..., -1, :, None]
        largest = max(largest, float(torch.linalg.eigvalsh(k.transpose(-1, -2) @ (weights * k)).max()))
    return largest


@torch.no_grad()
def run(model: Titans, source: Iterator[Piece], tokens: int, every: int, size: int, text: bool) -> list[dict[str, Any]]:
    """The lines of one stream of at least `tokens` tokens, in calls of `size`. text: how answers are scored."""
    watch, state, lines = Watch(model), model.initial_state(1), list[dict[str, Any]]()
    score, count = 0.0, 0
    for number, block in zip(tqdm(range(1, -(-tokens // size) + 1), mininterval=5.0), source, strict=False):
        position = torch.tensor([(number - 1) * size])
        logits, state = model.step(torch.from_numpy(block.tokens)[None], state, Step(position, None, aligned=True))
        asked = block.wanted >= 0
        rows, wanted = logits[0, torch.from_numpy(asked)], torch.from_numpy(block.wanted[asked])
        count += len(wanted)
        if text:
            score += float(F.cross_entropy(rows, wanted, reduction="sum")) / math.log(2)
        else:
            score += float((rows.argmax(-1) == wanted).sum())
        watch.after_block(state)
        done = number * size
        if done // every > (done - size) // every:
            name = "bits_per_byte" if text else "accuracy"
            lines.append({"tokens": done, name: score / count, **watch.worst, "lambda_max": watch.lambda_max()})
            tqdm.write(json.dumps(lines[-1]))
            watch.worst, score, count = {}, 0.0, 0
    return lines


def verdict(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether all numbers are finite and no norm grew, and the score at the start and the end."""
    tenth = max(1, len(lines) // 10)
    first, last = lines[:tenth], lines[-tenth:]
    growth = {
        f"{what} of {layer}": max(x[what][layer] for x in last) / max(x[what][layer] for x in first)
        for what in ("max_y", "w_norm", "s_norm")
        for layer in lines[0][what]
    }
    watched = ("max_y", "w_norm", "s_norm", "lambda_max")
    score = next(name for name in lines[0] if name in ("bits_per_byte", "accuracy"))
    finite = all(math.isfinite(v) for x in lines for what in watched for v in x[what].values())
    return {
        "all_finite": finite,
        "steady": finite and max(growth.values()) <= GROWTH,
        "largest_growth": max(growth.items(), key=lambda item: item[1]),
        "lambda_max": max(v for x in lines for v in x["lambda_max"].values()),
        f"{score}_first_tenth": sum(x[score] for x in first) / tenth,
        f"{score}_last_tenth": sum(x[score] for x in last) / tenth,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor() or platform.machine()


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text file for a byte-level model."
)
@click.option("--tokens", default=2_000_000, show_default=True)
@click.option("--every", default=50_000, show_default=True, help="Tokens between two lines of the record.")
@click.option(
    "--block", default=512, show_default=True, help="Tokens per call; a multiple of the chunk and the segment."
)
@click.option("--pairs", default=16, show_default=True, help="Pairs per recall episode.")
@click.option("--filler", default=256, show_default=True, help="Filler tokens per recall episode.")
@click.option("--seed", default=0, show_default=True, help="Seed of the recall episodes.")
@click.option("--threads", default=1, show_default=True)
def main(
    checkpoint: Path,
    output: Path,
    data: Path | None,
    tokens: int,
    every: int,
    block: int,
    pairs: int,
    filler: int,
    seed: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    loaded = titans.load(checkpoint)
    pieces = text_pieces(data) if data else recall_pieces(pairs, filler, seed)
    stream = {"data": data.name} if data else {"recall": {"pairs": pairs, "filler": filler, "seed": seed}}
    began = time.monotonic()
    lines = run(loaded.model, blocks(pieces, block), tokens, every, block, text=data is not None)
    result = {
        "checkpoint": loaded.model.config.name,
        "weights_sha256": loaded.weights_sha256,
        "stream": stream,
        "tokens": lines[-1]["tokens"],
        "block": block,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__},
        "seconds": round(time.monotonic() - began, 1),
        "verdict": verdict(lines),
        "lines": lines,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(output) as aside:
        aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result["verdict"], indent=2))


if __name__ == "__main__":
    main()
