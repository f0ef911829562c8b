"""Measures the time cost of low-precision memory: one decoded token on the bare CPU kernel, one thread.

    python -m benchmarks.low_precision_memory -o benchmarks/results/cpu-stored-memory-DATE.json

Memory dtypes, roundings and instruction sets are interleaved. "within" is the median of tokens that complete no chunk.
"mean" is the median over whole chunks, per token and with the chunk update.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks import report
from benchmarks.baselines.kernel import PROGRAM
from titans_export.bench.interleaved import interleave
from titans_export.bench.machine import others_busy
from titans_export.model.memory import MemorySpec
from titans_export.model.memory_dtype import pack_row, unpack_row
from titans_export.model.neural_memory import attributes, initial_rows, memory_layout

SPEC = MemorySpec((64, 256, 64), activation="silu", chunk_size=64)
HEADS = 8
KINDS = [("float32", "nearest")] + [
    (memory_dtype, rounding)
    for memory_dtype in ("bfloat16", "float16", "int8", "fp8")
    for rounding in ("nearest", "stochastic", "error_feedback")
]
CHUNKS_PER_TURN = 4


def write_case(path: Path, memory_dtype: str, rounding: str) -> int:
    """Writes a chunk of one-token calls for a memory that has learned. Returns the bytes of its state."""
    draw = torch.Generator().manual_seed(0)
    size = SPEC.widths[0]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    plain = memory_layout(SPEC)
    rows = initial_rows(SPEC, [normal(1, HEADS, *shape) * shape[0] ** -0.5 for shape in SPEC.shapes])
    fields = unpack_row(rows.numpy(), plain.fields)
    for i, shape in enumerate(SPEC.shapes):
        fields[f"S{i}"] = (0.01 * normal(1, HEADS, *shape)).numpy()
    stored = plain.stored(memory_dtype, rounding)
    state = torch.from_numpy(pack_row(fields, stored.fields, stored.size))
    tensors = {"state": state}
    for token in range(SPEC.chunk_size):
        for name in "qkv":
            x = normal(1, HEADS, 1, size)
            tensors[f"{token}.{name}"] = x if name == "v" else torch.nn.functional.normalize(x, dim=-1)
        for name, value in (("step_size", 0.01), ("momentum", 0.9), ("forget_gate", 0.001)):
            tensors[f"{token}.{name}"] = torch.full((1, HEADS, 1), value)
        tensors[f"{token}.fill"] = torch.tensor([token])
    node = attributes(SPEC, "update", aligned=False)
    if memory_dtype != "float32":
        node |= {"memory_dtype": memory_dtype, "rounding": rounding} | ({"seed": 1} if rounding == "stochastic" else {})
    save_file(tensors, path, {"calls": str(SPEC.chunk_size), "attributes": json.dumps(node)})
    return state.nbytes


def run(case: Path, out: Path, target: str) -> list[list[int]]:
    """Nanoseconds of each token, by chunk. Leaves out the first chunk, which runs with cold caches."""
    command = [PROGRAM, case, out, "--target", target, "--time", str(1 + CHUNKS_PER_TURN)]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    chunks: list[list[int]] = json.loads(done.stdout)["ns"]
    return chunks[1:]


@click.command(help=__doc__)
@click.option("--rounds", default=40, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(rounds: int, output: Path) -> None:
    listed = subprocess.run([str(PROGRAM), "--list-targets"], check=True, capture_output=True, text=True).stdout.split()
    targets = [name for name in listed if name != "plain"]
    busy = others_busy()
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder:
        cases = {kind: Path(folder, f"{'-'.join(kind)}.safetensors") for kind in KINDS}
        bytes_of = {kind: write_case(path, *kind) for kind, path in cases.items()}
        work = {
            f"{target} {memory_dtype} {rounding}": partial(run, path, Path(folder, "out.bin"), target)
            for target in targets
            for (memory_dtype, rounding), path in cases.items()
        }
        with tqdm(total=rounds * len(work)) as bar:
            timed = interleave(work, rounds, progress=bar.update)
    lines: list[dict[str, Any]] = []
    for name, of_name in timed.items():
        target, memory_dtype, rounding = name.split()
        chunks = [chunk for passes in of_name for chunk in passes]
        within = median(time for chunk in chunks for time in chunk[:-1]) / 1e3
        mean = median(sum(chunk) / len(chunk) for chunk in chunks) / 1e3
        kind = {"target": target, "memory_dtype": memory_dtype, "rounding": rounding}
        lines.append({**kind, "state_bytes": bytes_of[memory_dtype, rounding], "within_us": within, "mean_us": mean})
        click.echo(f"{name:28} within {within:6.1f} us, mean {mean:6.1f} us")
    settings = {"widths": SPEC.widths, "heads": HEADS, "chunk_size": SPEC.chunk_size, "threads": 1, "rounds": rounds}
    report.write(output, {**report.provenance(), "others_busy": busy, **settings, "lines": lines})


if __name__ == "__main__":
    main()
