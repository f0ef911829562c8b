"""Prints the plan of batched decode on GPUs: bytes and FLOP of one step, and what bounds it. Nothing is measured.

    python -m benchmarks.plan                  writes the table into docs/gpu.md
    python -m benchmarks.plan --check          exit code 1 if the page differs

A step is one token for each stream. Weights are float16 and are read once for all streams; states are float32.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import click

from benchmarks import costs
from benchmarks.report import ROOT
from benchmarks.sizes import SHAPES, Shape
from benchmarks.table import fill, markdown

PAGE = ROOT / "docs" / "gpu.md"
STREAMS = (1, 8, 64, 512)
CHUNK, WINDOW, PERSISTENT, WIDTH = 64, 256, 8, 64  # as in benchmarks.sizes
WEIGHT, STATE = 2, 4  # bytes of an element


class Device(NamedTuple):
    """Bytes per second of its memory, and dense float16 FLOP per second, from its data sheet."""

    name: str
    bandwidth: float
    flop: float
    memory: float


DEVICES = (Device("H200", 4.8e12, 989e12, 141e9), Device("AGX Orin 64 GB", 204.8e9, 42.5e12, 64e9))


class Step(NamedTuple):
    """Bytes and FLOP of one step."""

    weights: float
    states: float
    flop: float
    resident: float  # bytes of all states

    @property
    def bytes(self) -> float:
        return self.weights + self.states


def matrix_parameters(shape: Shape) -> int:
    """Parameters that a token multiplies: all matrices but the embedding, of which it reads one row."""
    inner = shape.memory_heads * WIDTH
    attention = 4 * shape.dim**2
    memory = 3 * shape.dim * inner + 3 * shape.dim * shape.memory_heads + 2 * shape.dim * inner
    context, gate = 2 * shape.dim * inner, shape.dim**2
    return (
        shape.layers * (attention + memory + context + gate + 3 * shape.dim * shape.hidden)
        + shape.dim * shape.vocabulary
    )


def step(shape: Shape, streams: int) -> Step:
    """One token for each stream, in the mean over a chunk and a segment."""
    parameters, widths = matrix_parameters(shape), (WIDTH, WIDTH)
    rows = PERSISTENT + 2 * (WINDOW + 1) / 2  # that attention sees: retrieved rows and tokens
    cache = 2 * rows * shape.dim * STATE
    memory = shape.memory_heads * costs.decode_bytes(widths, CHUNK)
    flop = 2 * parameters + shape.layers * (
        4 * rows * shape.dim + shape.memory_heads * (costs.update_flop(widths, CHUNK) + costs.read_flop(widths))
    )
    logits = shape.vocabulary * STATE
    held = 2 * (PERSISTENT + 2 * WINDOW) * shape.dim * STATE
    held += shape.memory_heads * costs.decode_working_set(widths, CHUNK)
    return Step(
        parameters * WEIGHT,
        streams * (shape.layers * (cache + memory) + logits),
        streams * flop,
        streams * shape.layers * held,
    )


def table() -> str:
    """A row for each size, device and number of streams."""
    lines = []
    for size in ("350M", "1.3B"):
        for device in DEVICES:
            for streams in STREAMS:
                one = step(SHAPES[size], streams)
                needed = one.resident + one.weights
                seconds = max(one.bytes / device.bandwidth, one.flop / device.flop)
                by_bytes = one.bytes / device.bandwidth >= one.flop / device.flop
                bound = ("weights" if one.weights >= one.states else "states") if by_bytes else "FLOP"
                fits = needed < device.memory
                lines.append(
                    [
                        f"{size}, {device.name}",
                        f"{streams}",
                        f"{one.weights / 1e9:.2f}",
                        f"{one.states / 1e9:.2f}",
                        f"{one.flop / 1e9:,.0f}",
                        f"{one.resident / 1e9:.1f}",
                        f"{streams / seconds:,.0f}" if fits else "does not fit",
                        bound if fits else "-",
                    ]
                )
    sizes = ["weights, GB", "states, GB", "GFLOP", "held, GB"]
    header = ["model, device", "streams", *sizes, "at most tokens/s", "bound by"]
    return markdown(header, lines)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare without writing.")
def main(check: bool) -> None:
    text = PAGE.read_text(encoding="utf-8")
    filled = fill(text, {"plan": table()}, PAGE)
    if check and filled != text:
        sys.exit(f"[{PAGE.name}] the plan differs from the page. Fix: run python -m benchmarks.plan")
    PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
