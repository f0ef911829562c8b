"""Measures the cost of bfloat16 memory: a trained model reads real text, and its memory is rounded after each chunk.

    python -m benchmarks.bfloat16_memory examples/checkpoints/mac-bytes --text book.txt

Both measurements read the same tokens. Each output line covers one part of the stream:

- Whole model, in PyTorch: once unchanged, once with W and S rounded to bfloat16 after each chunk, as the kernel does
  (tests/plugins/test_kernel.py). Reports bits per byte and the difference of logits.
- Each memory layer alone: the operands of the unrounded model go through the CPU kernel in both dtypes and through the
  float64 reference. Reports the relative error of the retrievals y (root mean square) and of W.

Without --text the stream is the source of the standard library, as in benchmarks.long_stream.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks import report
from benchmarks.baselines.kernel import PROGRAM
from benchmarks.text import standard_library
from titans_export.checkpoints import titans
from titans_export.model import memory_layer
from titans_export.model.layers import StreamState
from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes, memory_layout, neural_memory_update

OPERANDS = ("q", "k", "v", "step_size", "momentum", "forget_gate")
CHUNKS_PER_CALL = 16
Recorded = dict[str, list[Tensor]]  # by operand, one tensor per chunk


@contextmanager
def recording(calls: list[dict[str, Tensor]]) -> Iterator[None]:
    """Records the inputs of memory layers in `calls`, in call order."""
    update: Any = memory_layer.__dict__["memory_update"]

    def record(
        spec: MemorySpec, state: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Any, *rest: Any, **named: Any
    ) -> Any:
        calls.append(dict(zip(OPERANDS, (q, k, v, *gates), strict=True)))
        return update(spec, state, q, k, v, gates, *rest, **named)

    memory_layer.__dict__["memory_update"] = record
    try:
        yield
    finally:
        memory_layer.__dict__["memory_update"] = update


def rounded(spec: MemorySpec, state: StreamState) -> StreamState:
    """The state with W and S of every memory rounded to bfloat16."""
    count = 2 * spec.weights
    out = dict(state)
    for name in (name for name in state if name.endswith(".memory")):
        rows = state[name].clone()
        rows[..., :count] = rows[..., :count].to(torch.bfloat16).to(rows.dtype)
        out[name] = rows
    return out


def bits(logits: Tensor, following: Tensor) -> float:
    """Bits of the following tokens, summed."""
    return float(torch.nn.functional.cross_entropy(logits, following, reduction="sum")) / math.log(2)


def pack_rows(spec: MemorySpec, rows: Tensor, memory_dtype: str) -> Tensor:
    """Converts float32 rows of a new memory to the kernel's rows in that memory dtype."""
    if memory_dtype == "float32":
        return rows
    count = 2 * spec.weights
    words = rows[..., :count].to(torch.bfloat16).contiguous().view(torch.float32)
    packed = torch.cat([words, rows[..., count:]], -1)
    used = memory_layout(spec).fields[-1].offset + 1 - count + count // 2
    return packed[..., : -(-used // 16) * 16].contiguous()


def run_kernel(spec: MemorySpec, rows: Tensor, recorded: Recorded, memory_dtype: str) -> tuple[Tensor, Tensor]:
    """Runs the CPU kernel. Returns y of all tokens (1, H, T, D) and the last W (1, H, weights), float32."""
    tensors, calls = {"state": pack_rows(spec, rows, memory_dtype)}, 0
    for start in range(0, len(recorded["q"]), CHUNKS_PER_CALL):
        for name in OPERANDS:
            tensors[f"{calls}.{name}"] = torch.cat(recorded[name][start : start + CHUNKS_PER_CALL], 2).contiguous()
        calls += 1
    node = {**attributes(spec, "update", True), "memory_dtype": memory_dtype}
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder:
        case, out = Path(folder, "case.safetensors"), Path(folder, "out.bin")
        save_file(tensors, case, {"calls": str(calls), "attributes": json.dumps(node)})
        subprocess.run([PROGRAM, case, out], check=True)
        values = torch.from_numpy(np.fromfile(out, np.float32))
    y, at = [], 0
    for call in range(calls):
        shape = tensors[f"{call}.q"].shape
        y.append(values[at : at + shape.numel()].reshape(shape))
        at += shape.numel() + shape[0] * shape[1] * 4
    state = values[at:].reshape(tensors["state"].shape)
    if memory_dtype == "bfloat16":
        weights = state[..., : spec.weights // 2].contiguous().view(torch.bfloat16).float()
    else:
        weights = state[..., : spec.weights]
    return torch.cat(y, 2), weights


def run_reference(spec: MemorySpec, rows: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Runs the reference in float64. Returns as `run_kernel`."""
    state, y = rows.double(), []
    for chunk in range(len(recorded["q"])):
        update = neural_memory_update(spec, state, *(recorded[name][chunk].double() for name in OPERANDS))
        state = update.state
        y.append(update.y)
    return torch.cat(y, 2), state[..., : spec.weights]


def relative(got: Tensor, right: Tensor) -> float:
    """Root mean square of the difference, divided by that of `right`."""
    return float((got.double() - right).square().mean().sqrt() / right.square().mean().sqrt())


def measure(model: Any, tokens: Tensor, window: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measurements along the stream for the whole model, and the layers' errors by name."""
    spec = model.config.memory.spec
    size = spec.chunk_size
    states = {"float32": model.initial_state(1), "bfloat16": rounded(spec, model.initial_state(1))}
    fresh = {name: rows.detach() for name, rows in states["float32"].items() if name.endswith(".memory")}
    calls: list[dict[str, Tensor]] = []
    lines: list[dict[str, Any]] = []
    totals: dict[str, float] = {}
    for at in tqdm(range(0, tokens.shape[1] - size, size), unit="chunk"):
        part, following = tokens[:, at : at + size], tokens[0, at + 1 : at + size + 1]
        with recording(calls):
            logits, states["float32"] = model.feed(part, states["float32"], at)
        other, states["bfloat16"] = model.feed(part, states["bfloat16"], at)
        states["bfloat16"] = rounded(spec, states["bfloat16"])
        for name, value in (
            ("float32", bits(logits[0], following)),
            ("bfloat16", bits(other[0], following)),
            ("kl", float((logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum())),
        ):
            totals[name] = totals.get(name, 0.0) + value
        totals["tokens"] = totals.get("tokens", 0) + size
        if totals["tokens"] >= window:
            lines.append(
                {
                    "position": at + size,
                    "bits_per_byte_float32": totals["float32"] / totals["tokens"],
                    "bits_per_byte_bfloat16": totals["bfloat16"] / totals["tokens"],
                    "kl_per_token": totals["kl"] / totals["tokens"],
                }
            )
            totals = {}
    layers = {}
    for i, name in enumerate(fresh):
        recorded = {operand: [call[operand] for call in calls[i :: len(fresh)]] for operand in OPERANDS}
        right_y, right_w = run_reference(spec, fresh[name], recorded)
        found = {
            memory_dtype: run_kernel(spec, fresh[name], recorded, memory_dtype)
            for memory_dtype in ("float32", "bfloat16")
        }
        layers[name] = {
            memory_dtype: {
                "y_by_window": [
                    relative(y[:, :, start : start + window], right_y[:, :, start : start + window])
                    for start in range(0, y.shape[2] - window + 1, window)
                ],
                "w_at_the_end": relative(w, right_w),
            }
            for memory_dtype, (y, w) in found.items()
        }
    return lines, layers


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text file, read as bytes.")
@click.option("--tokens", type=click.IntRange(1), default=100_096, show_default=True)
@click.option("--window", type=click.IntRange(1), default=10_000, show_default=True, help="Tokens per output line.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Result file to write.")
@torch.no_grad()
def main(checkpoint: Path, text: Path | None, tokens: int, window: int, output: Path | None) -> None:
    model = titans.load(checkpoint).model.eval()
    data = text.read_bytes() if text else standard_library(tokens + 1)
    stream = torch.from_numpy(np.frombuffer(data[: tokens + 1], np.uint8).astype(np.int64))[None]
    lines, layers = measure(model, stream, window)
    result = {
        "what": "a memory in bfloat16 against float32, over real text",
        "checkpoint": model.config.name,
        "text": text.name if text else "sources of Python's standard library",
        "tokens": stream.shape[1] - 1,
        **report.provenance(),
        "model": lines,
        "layers": layers,
    }
    if output:
        report.write(output, result)
    click.echo(json.dumps({"model": lines, "layers": layers}, indent=1))


if __name__ == "__main__":
    main()
