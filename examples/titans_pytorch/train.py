"""Trains a small MemoryAsContextTransformer of titans-pytorch on text, with every setting of the library's own script.

    pip install titans-pytorch==0.5.5
    python examples/titans_pytorch/train.py --data book.txt -o out/

The last tenth of the text is held out. Writes out/model.pt, a plain state dict, and out/model.json, the constructor's
arguments. The export needs only these:

    titans-export export out/model.pt --format titans-pytorch --config out/model.json -o model.titans
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from titans_pytorch import MemoryAsContextTransformer, MemoryMLP
from tqdm import tqdm

from titans_export.files import replacing_file

HELD_OUT = 0.1
CONFIG: dict[str, Any] = {
    "class": "MemoryAsContextTransformer",
    "version": "0.5.5",
    "num_tokens": 256,
    "dim": 96,
    "depth": 4,
    "dim_head": 24,
    "heads": 4,
    "segment_len": 32,
    "num_persist_mem_tokens": 4,
    "num_longterm_mem_tokens": 4,
    "neural_memory_layers": [2, 4],
    "neural_memory_segment_len": 4,
    "neural_memory_batch_size": 128,
    "neural_mem_gate_attn_output": False,
    "neural_mem_weight_residual": True,
    "neural_memory_qkv_receives_diff_views": True,
    "sliding_window_attn": True,
    "neural_memory_model": {"type": "MemoryMLP", "dim": 24, "depth": 2, "expansion_factor": 2.0},
    "neural_memory_kwargs": {
        "dim_head": 24,
        "heads": 4,
        "attn_pool_chunks": True,
        "qk_rmsnorm": True,
        "momentum": True,
        "momentum_order": 1,
        "default_step_transform_max_lr": 0.1,
        "max_mem_layer_modulation": 1.0,
        "per_parameter_lr_modulation": True,
        "spectral_norm_surprises": True,
        "activation": None,
        "max_grad_norm": None,
        "gated_transition": False,
        "store_with_lookahead_value": False,
    },
}


def build(config: dict[str, Any]) -> MemoryAsContextTransformer:
    """Builds the library's model from the arguments in model.json."""
    arguments = {name: value for name, value in config.items() if name not in ("class", "version")}
    network = dict(arguments.pop("neural_memory_model"))
    network.pop("type")
    arguments["neural_memory_layers"] = tuple(arguments["neural_memory_layers"])
    model = MemoryAsContextTransformer(neural_memory_model=MemoryMLP(**network), **arguments)
    for parameter in model.parameters():
        # The heads' initial memories are views of one tensor, and optimisers write in place.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def split(text: bytes) -> tuple[bytes, bytes]:
    """Splits the text into training and held-out parts."""
    kept = int(len(text) * (1 - HELD_OUT))
    return text[:kept], text[kept:]


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", default=5.0, show_default=True, help="Training time.")
@click.option("--batch", default=4, show_default=True)
@click.option("--window", default=256, show_default=True, help="Tokens per sequence.")
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    data: Path, output: Path, minutes: float, batch: int, window: int, learning_rate: float, seed: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    text = data.read_bytes()
    kept = torch.frombuffer(bytearray(split(text)[0]), dtype=torch.uint8).long()
    model = build(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    began, steps, loss = time.monotonic(), 0, torch.tensor(0.0)
    with tqdm(total=100, unit="%") as bar:
        while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (steps + 1) / 20, 2.02 - 2 * share)
            start = torch.randint(0, len(kept) - window - 1, (batch, 1))
            loss = model(kept[start + torch.arange(window + 1)], return_loss=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            bar.n = round(100 * share)
            bar.set_postfix(steps=steps, bits_per_byte=float(loss.detach()) / 0.6931471805599453)
    output.mkdir(parents=True, exist_ok=True)
    with replacing_file(output / "model.pt") as aside:
        torch.save(model.state_dict(), aside)
    with replacing_file(output / "model.json") as aside:
        aside.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    record = {
        "script": "examples/titans_pytorch/train.py",
        "data": {"name": data.name, "sha256": hashlib.sha256(text).hexdigest()},
        "held_out": "the last tenth",
        "steps": steps,
        "minutes": minutes,
        "batch": batch,
        "window": window,
        "seed": seed,
        "last_bits_per_byte": float(loss.detach()) / 0.6931471805599453,
    }
    with replacing_file(output / "training.json") as aside:
        aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
