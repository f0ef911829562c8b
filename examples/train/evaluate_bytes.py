"""Measures bits per byte of a byte-level checkpoint on held-out text, with its memory learning and frozen.

    python examples/train/evaluate_bytes.py examples/checkpoints/mac-bytes --data book.txt

The text is the last tenth of the file, which train_bytes.py holds out. It is read as one stream from a fresh memory.
The numbers go into the checkpoint's training.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from tqdm import tqdm
from train_bytes import HELD_OUT

from titans_export.checkpoints import titans
from titans_export.files import replacing_file
from titans_export.model import Step, Titans

RECORD = "training.json"


@torch.no_grad()
def bits_per_byte(model: Titans, text: bytes, learn: bool, block: int = 512) -> float:
    """Bits per byte over the whole blocks of `text`, as one stream. block: a multiple of the chunk and of MAC's
    segment.
    """
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    state, nats = model.initial_state(1), 0.0
    starts = range(0, len(tokens) - block, block)
    for start in tqdm(starts, mininterval=5.0):
        step = Step(torch.tensor([start]), torch.tensor([learn]), aligned=True)
        logits, state = model.step(tokens[None, start : start + block], state, step)
        nats += float(F.cross_entropy(logits[0], tokens[start + 1 : start + block + 1], reduction="sum"))
    return nats / math.log(2) / (len(starts) * block)


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--bytes", "limit", type=int, help="Read only this many bytes of the held-out text.")
@click.option("--threads", default=1, show_default=True)
def main(checkpoint: Path, data: Path, limit: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    text = data.read_bytes()
    held_out = text[int(len(text) * (1 - HELD_OUT)) :][:limit]
    loaded = titans.load(checkpoint)
    result = {
        "weights_sha256": loaded.weights_sha256,
        "data": {"name": data.name, "sha256": hashlib.sha256(text).hexdigest()},
        "held_out_bytes": len(held_out),
        "bits_per_byte": {
            name: round(bits_per_byte(loaded.model, held_out, learn), 4)
            for name, learn in (("learning", True), ("frozen", False))
        },
    }
    click.echo(json.dumps(result, indent=2))
    record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    with replacing_file(checkpoint / RECORD) as aside:
        aside.write_text(json.dumps({**record, "evaluation": result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
