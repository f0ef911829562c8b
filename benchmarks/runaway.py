"""A model whose memory diverges, as long streams: without limits, and with those that `titans-export guard` found.

    titans-export guard titans-pytorch-bytes.titans --data book.txt
    python -m benchmarks.runaway titans-pytorch-bytes.titans --text book.txt -o benchmarks/results/cpu-runaway-DATE.json

BUNDLE has limits, and its tokens are bytes. One stream with the bundle's guard reads --tokens bytes of the text. Its
bits per byte in each window of 100,000 are compared with those of its first 5,000 bytes. A second stream reads 8,000
bytes of the text, then one byte 20,000 times, then text again. For comparison, streams without a guard read the same.
The exit code is 3 if a window is more than 2 % worse and the stream still learns, if the guard did not act on the
repeated byte, or if the text after it is more than 2 % worse than in a stream that never read it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

import titans_runtime
from benchmarks.report import provenance, write
from benchmarks.text import pieces

FAILED = 3
PIECE = 5000  # bytes per feed, and of the start that windows are compared with
WINDOW = 100_000
ALLOWED = 1.02  # bits per byte over those at the start
BEFORE, REPEATED = 8000, 20_000  # bytes


def bits_of(stream: titans_runtime.Stream, text: bytes) -> float:
    """Bits to predict the text."""
    return -float(np.sum(stream.score(text), dtype=np.float64)) / math.log(2)


def read(session: titans_runtime.Session, blocks: Iterator[bytes]) -> dict[str, Any]:
    """Bits per byte of the start and of each window of one stream, and what its guard and its health report."""
    windows: list[dict[str, Any]] = []
    bits = first = 0.0
    with closing(session.stream()) as stream:
        for block in blocks:
            found = bits_of(stream, block)
            first = first or found / len(block)
            bits += found
            if stream.position % WINDOW:
                continue
            report, health = stream.guard_report, stream.health
            windows.append({
                "position": stream.position,
                "bits_per_byte": bits / WINDOW,
                "repairs": report.repairs,
                "learning": stream.learning,
                "health": health.state,
            })  # fmt: skip
            bits = 0.0
        return {
            "tokens": stream.position,
            "first_bits_per_byte": first,
            "worst_window": max(line["bits_per_byte"] for line in windows) if windows else None,
            "learning": stream.learning,
            "guard": asdict(stream.guard_report),
            "health": asdict(stream.health),
            "windows": windows,
        }


def attack(session: titans_runtime.Session, text: bytes) -> dict[str, Any]:
    """Bits per byte of text after a repeated byte, and of the same text in a stream that never read that byte."""
    before, after = text[:BEFORE], text[BEFORE:]
    with closing(session.stream()) as stream, closing(session.stream()) as other:
        for one in (stream, other):
            one.feed(before, outputs="none")
        stream.feed(bytes([before[0]]) * REPEATED, outputs="none")
        peaks = stream.peak_norms()
        return {
            "after": bits_of(stream, after) / len(after),
            "without": bits_of(other, after) / len(after),
            "largest_norm": max(peaks.values()),
            "learning": stream.learning,
            "guard": asdict(stream.guard_report),
            "health": asdict(stream.health),
        }


def judge(guarded: dict[str, Any], attacked: dict[str, Any]) -> list[str]:
    """The requirements that failed."""
    failures = []
    limit = ALLOWED * guarded["first_bits_per_byte"]
    lost = [line["position"] for line in guarded["windows"] if not line["bits_per_byte"] <= limit and line["learning"]]
    if lost:
        failures.append(f"the window that ends at {lost[0]:,} has more than {limit:.3f} bits per byte")
    if not attacked["guard"]["rollbacks"]:
        failures.append("the guard did not act on a repeated byte")
    if not attacked["after"] <= ALLOWED * attacked["without"] and attacked["learning"]:
        failures.append(f"text after a repeated byte: {attacked['after']:.3f} bits per byte, {attacked['without']:.3f}")
    return failures


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--tokens", type=click.IntRange(WINDOW), default=2_000_000, show_default=True)
@click.option("--unguarded-tokens", type=click.IntRange(WINDOW), default=400_000, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Result file to write.")
def main(bundle: Path, text: Path, tokens: int, unguarded_tokens: int, threads: int, output: Path | None) -> None:
    with text.open("rb") as file:
        start = file.read(BEFORE + 30_000)
    found: dict[str, Any] = {}
    for name, guard, count in (("guarded", "bundle", tokens), ("unguarded", "off", unguarded_tokens)):
        session = titans_runtime.Session(bundle, threads=threads, guard=guard)
        if session.info["tokenizer"]["kind"] != "bytes":
            raise click.ClickException("the stream is bytes: give a bundle whose tokens are bytes")
        with session:
            found[name] = {
                "policy": session.info["guard"]["policy"],
                **read(session, pieces([text], PIECE, count)),
                "repeated_byte": attack(session, start),
            }
    if found["guarded"]["policy"] == "off":
        raise click.ClickException("the bundle has no limits: run titans-export guard BUNDLE --data FILE")
    failures = judge(found["guarded"], found["guarded"]["repeated_byte"])
    result = {
        "benchmark": "runaway",
        "name": bundle.stem,
        "text": text.name,
        "threads": threads,
        **provenance(),
        **found,
    }
    result["passed"] = not failures
    if output is not None:
        write(output, result)
    for name, one in found.items():
        hit, worst = one["repeated_byte"], one["worst_window"]
        click.echo(
            f"{name}: first {one['first_bits_per_byte']:.3f} bits per byte, worst window of {one['tokens']:,} bytes "
            f"{worst:.3f}, {one['guard']['repairs']} repairs; text after a repeated byte {hit['after']:.3f}, "
            f"without it {hit['without']:.3f}"
        )
    if failures:
        click.echo(f"[runaway] {'; '.join(failures)}", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
