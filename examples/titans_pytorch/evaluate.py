"""Measures bits per byte of a byte-level titans-pytorch model: the exported stream, and the library's parallel forward.

    python examples/titans_pytorch/evaluate.py examples/checkpoints/titans-pytorch-bytes --data book.txt

CHECKPOINT is a folder with model.json, and model.pt or model.safetensors. The text is the last tenth of the file, which
train.py holds out. It is read as one stream from a fresh memory. The library reads its first --library-bytes in one
call, in float32 and in float64. The first byte counts as uniform.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from titans_pytorch import MemoryAsContextTransformer
from train import build, split

import titans_runtime
from titans_export.exporting import export_checkpoint

PIECE = 1 << 16  # bytes per feed


def find_weights(folder: Path) -> Path:
    """The weight file in a checkpoint folder."""
    found = next((folder / name for name in ("model.safetensors", "model.pt") if (folder / name).is_file()), None)
    if found is None:
        raise click.ClickException(
            f"[evaluate] no model.safetensors or model.pt in {folder}. Fix: give a folder that train.py wrote"
        )
    return found


def load_library(folder: Path) -> MemoryAsContextTransformer:
    """Loads the checkpoint with the library itself."""
    model = build(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    weights = find_weights(folder)
    tensors = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


@torch.no_grad()
def library_bits(model: MemoryAsContextTransformer, text: bytes) -> float:
    """Bits per byte of one parallel forward, in the model's precision."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    logits = model(tokens[None], disable_flex_attn=True)[0].double()
    nats = float(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")) + math.log(256)
    return nats / math.log(2) / len(text)


def stream_bits(session: titans_runtime.Session, text: bytes, count: int) -> tuple[float, float, int]:
    """Bits per byte of the whole text and of its first `count` bytes, in one stream, and the state's size in bytes."""
    with session.stream() as stream:
        size = stream.state_bytes
        parts = [text[:count], *(text[at : at + PIECE] for at in range(count, len(text), PIECE))]
        bits = [-float(np.sum(stream.score(part), dtype=np.float64)) / math.log(2) for part in parts]
        if stream.state_bytes != size:
            raise click.ClickException(
                f"[evaluate] the state grew: expected {size} bytes, got {stream.state_bytes}. "
                "Fix: report this with the bundle"
            )
    return sum(bits) / len(text), bits[0] / min(count, len(text)), size


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Bundle of the checkpoint, if exported.",
)
@click.option("--bytes", "limit", type=click.IntRange(2), help="Read only this many bytes of the held-out text.")
@click.option("--library-bytes", type=click.IntRange(2), default=4096, show_default=True)
@click.option("--whole-file", is_flag=True, help="Read the whole file, which training has not seen.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    checkpoint: Path,
    data: Path,
    bundle: Path | None,
    limit: int | None,
    library_bytes: int,
    whole_file: bool,
    threads: int,
    as_json: bool,
) -> None:
    torch.set_num_threads(threads)
    text = data.read_bytes()
    text = (text if whole_file else split(text)[1])[:limit]
    count = min(library_bytes, len(text))
    if count < 2:
        raise click.ClickException(f"[evaluate] the text is too short: {len(text)} bytes. Fix: give another --data")
    with tempfile.TemporaryDirectory() as aside:
        if bundle is None:
            bundle = Path(aside, "model.titans")
            config = str(checkpoint / "model.json")
            export_checkpoint(find_weights(checkpoint), bundle, format="titans-pytorch", config=config)
        with titans_runtime.Session(bundle, threads=threads) as session:
            began = time.monotonic()
            whole, first, state_bytes = stream_bits(session, text, count)
            seconds = time.monotonic() - began
    model = load_library(checkpoint)
    result: dict[str, Any] = {
        "bytes": len(text),
        "bits_per_byte": round(whole, 6),
        "bytes_per_second": round(len(text) / seconds),
        "state_bytes": state_bytes,
        "first_bytes": count,
        "bits_per_byte_of_the_first": {
            "runtime": round(first, 6),
            "titans-pytorch float32": round(library_bits(model, text[:count]), 6),
            "titans-pytorch float64": round(library_bits(model.double(), text[:count]), 6),
        },
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{len(text):,} bytes in one stream: {whole:.4f} bits per byte, {len(text) / seconds:,.0f} bytes/s, "
        f"a state of {state_bytes:,} bytes"
    )
    click.echo(f"its first {count:,} bytes, bits per byte:")
    for name, bits in result["bits_per_byte_of_the_first"].items():
        click.echo(f"  {name:24}{bits:.6f}")


if __name__ == "__main__":
    main()
