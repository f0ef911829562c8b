"""Runs a very long stream and checks that memory use and speed stay constant and outputs stay finite.

    python -m benchmarks.long_stream build/bench/mac-bytes.titans -o long-stream.json
    python -m benchmarks.long_stream build/bench/mac-bytes.titans --decode --tokens 300000

BUNDLE has bytes as tokens. Without --text the stream is source code: the .py files of Python's standard library, then
those of installed packages, each once. The exit code is 3 in three cases:

- Memory use grows by 1 MiB or more between token 10,000 and the end.
- The speed of the last 100,000 tokens differs by more than 5 % from that of the first 100,000 after token 10,000.
- The probability of a token is not finite.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np

import titans_runtime
from benchmarks.report import provenance, write
from benchmarks.text import pieces, source_files
from titans_export.bench.machine import cores, others_busy
from titans_export.bench.worker import memory_bytes

FAILED = 3
SETTLED = 10_000  # tokens after which all one-time allocations are done
WINDOW = 100_000  # tokens over which the speed is compared
GROWTH_BYTES = 1 << 20
SPEED_MARGIN = 0.05
PIECE = 5000  # bytes per feed: not a whole number of chunks, so that every graph keeps running


class Watch:
    """Time and bits of every window of the stream, and memory at its start and end."""

    def __init__(self, stream: titans_runtime.Stream) -> None:
        self._stream = stream
        self.lines: list[dict[str, float]] = []
        self.rss_at_start = 0
        self.bits = self.seconds = 0.0
        self._window_bits = self._window_seconds = 0.0

    def feed(self, piece: bytes) -> None:
        """Scores a piece of the text."""
        began = time.perf_counter()
        logprobs = self._stream.score(piece)
        taken = time.perf_counter() - began
        bits = -float(np.sum(logprobs, dtype=np.float64)) / math.log(2)
        position = self._stream.position
        self.bits, self.seconds = self.bits + bits, self.seconds + taken
        if position <= SETTLED:
            self.rss_at_start = memory_bytes()[0] if position == SETTLED else 0
            return
        self._window_bits, self._window_seconds = self._window_bits + bits, self._window_seconds + taken
        if (position - SETTLED) % WINDOW:
            return
        line = {
            "position": position,
            "tokens_per_second": WINDOW / self._window_seconds,
            "bits_per_byte": self._window_bits / WINDOW,
            "rss_bytes": memory_bytes()[0],
        }
        self.lines.append(line)
        self._window_bits = self._window_seconds = 0.0


def judge(result: dict[str, Any]) -> list[str]:
    """The requirements that failed."""
    failures = []
    if result["rss_growth_bytes"] >= GROWTH_BYTES:
        failures.append(f"memory grew by {result['rss_growth_bytes']:,} bytes")
    if not abs(result["speed_ratio"] - 1) <= SPEED_MARGIN:
        failures.append(f"the last window ran at {result['speed_ratio']:.3f} of the first one's speed")
    if not math.isfinite(result["bits_per_byte"]):
        failures.append("a token's probability was no number")
    return failures


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text file to read instead.")
@click.option("--tokens", type=click.IntRange(SETTLED + 2 * WINDOW), default=2_110_000, show_default=True)
@click.option("--decode", is_flag=True, help="Feed single tokens, not pieces of 5,000.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads.  [default: all cores]")
@click.option("--memory-kernel", type=click.Choice(("auto", "require", "off")), default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Result file to write.")
def main(
    bundle: Path, text: Path | None, tokens: int, decode: bool, threads: int, memory_kernel: str, output: Path | None
) -> None:
    threads, busy = threads or cores(), others_busy()
    session = titans_runtime.Session(bundle, threads=threads, memory_kernel=memory_kernel)
    if session.info["tokenizer"]["kind"] != "bytes":
        raise click.ClickException("the stream is bytes: give a bundle whose tokens are bytes, such as mac-bytes")
    files = [text] if text else source_files()
    with closing(session.stream()) as stream:
        watch = Watch(stream)
        for piece in pieces(files, 1 if decode else PIECE, tokens):
            watch.feed(piece)
        lines, position = watch.lines, stream.position
        rss_at_end, state_bytes = memory_bytes()[0], stream.state_bytes
    if position < tokens:
        raise click.ClickException(f"the text ended after {position:,} tokens: give --text or a smaller --tokens")
    result = {
        "benchmark": "long-stream",
        "name": f"{bundle.stem}, {'token by token' if decode else 'in pieces'}",
        "fed": "token by token" if decode else f"in pieces of {PIECE:,}",
        "text": text.name if text else "Python source files",
        "tokens": position,
        "speed_ratio": lines[-1]["tokens_per_second"] / lines[0]["tokens_per_second"],
        "rss_growth_bytes": rss_at_end - watch.rss_at_start,
        "rss_bytes_at_start": watch.rss_at_start,
        "rss_bytes_at_end": rss_at_end,
        "tokens_per_second": position / watch.seconds,
        "bits_per_byte": watch.bits / position,
        "state_bytes": state_bytes,
        "threads": threads,
        "others_busy": busy,
        "memory_kernel": session.info["memory_kernel"],
        **provenance(),
        "windows": lines,
    }
    failures = judge(result)
    result["passed"] = not failures
    if output is not None:
        write(output, result)
    click.echo(
        f"{position:,} tokens: memory grew by {result['rss_growth_bytes']:,} bytes, speed of the last window "
        f"{result['speed_ratio']:.3f} of the first one's, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['bits_per_byte']:.3f} bits per byte"
    )
    if failures:
        click.echo(f"[long-stream] the stream is not steady: {'; '.join(failures)}", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
