"""Runs a thousand live streams of one bundle and checks results, memory use and batch speed.

    python -m benchmarks.many_streams build/bench/mac-bytes.titans -o many-streams.json

Each stream gets its own tokens, all the same number, in batches with one token per stream (step_batch). A sample of the
streams is compared bit by bit with streams that run alone. A second pass has a memory budget for a tenth of the streams
and spills the rest. Speeds come from a few hundred streams that fit: a batch and a loop of single steps, interleaved.

The exit code is 3 if a bit differs, or if resident memory misses its expected growth by more than a tenth and 32 MiB.
Expected are state_bytes times streams, or the budget.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
SAMPLES = 16  # streams that are compared
SLACK_PART = 0.1
SLACK_BYTES = 32 << 20  # extra memory of the allocator, of a batch, and of a state being moved


def texts(streams: int, tokens: int) -> list[np.ndarray]:
    """Tokens for each stream, all different, from real text."""
    blocks = pieces(source_files(), tokens, streams * tokens)
    return [np.frombuffer(block, np.uint8).astype(np.int32) for block in blocks][:streams]


def run_all(bundle: Path, sequences: list[np.ndarray], budget: int) -> dict[str, Any]:
    """Runs one stream per sequence, token by token. Returns the memory growth and the sampled streams that differ."""
    with tempfile.TemporaryDirectory() as folder:
        spill_dir = folder if budget else None
        with titans_runtime.Session(bundle, threads=1, memory_budget=budget, spill_dir=spill_dir) as session:
            return run_in(session, sequences)


def run_apart(bundle: Path, sequences: list[np.ndarray], budget: int) -> dict[str, Any]:
    """As `run_all`, in a new process, so that memory freed earlier does not count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
        return worker.submit(run_all, bundle, sequences, budget).result()


def run_in(session: titans_runtime.Session, sequences: list[np.ndarray]) -> dict[str, Any]:
    session.stream().feed(sequences[0], outputs="none")  # triggers one-time allocations
    before = memory_bytes()[0]
    streams = [session.stream() for _ in sequences]
    sampled = np.linspace(0, len(streams) - 1, SAMPLES).astype(int)
    kept = []
    began = time.perf_counter()
    for tokens in np.stack(sequences, axis=1):
        kept.append(session.step_batch(streams, tokens)[sampled])
    seconds = time.perf_counter() - began
    grown = memory_bytes()[0] - before
    different = []
    for place, index in enumerate(sampled):
        with session.stream() as alone:
            expected = [alone.step(int(token)) for token in sequences[index]]
        if not np.array_equal(np.stack(expected), np.stack(kept)[:, place]):
            different.append(int(index))
    metrics = session.metrics()
    return {
        "streams": len(streams),
        "tokens_each": len(sequences[0]),
        "state_bytes": streams[0].state_bytes,
        "rss_growth_bytes": grown,
        "resident_bytes": metrics.resident_bytes,
        "spilled": metrics.spilled,
        "restored": metrics.restored,
        "tokens_per_second": len(streams) * len(sequences[0]) / seconds,
        "different_streams": different,
    }


def speeds(bundle: Path, settings: list[tuple[int, int]], streams: int, turns: int) -> list[dict[str, Any]]:
    """Tokens per second of one step of all streams, batched and in a loop. All settings are interleaved."""
    sessions = [titans_runtime.Session(bundle, threads=t, batch_threads=b) for t, b in settings]
    crowds = [[session.stream() for _ in range(streams)] for session in sessions]
    taken: list[dict[str, list[float]]] = [{"batch": [], "loop": []} for _ in settings]
    for turn in range(turns + 1):  # the first is a warm-up
        for session, crowd, times in zip(sessions, crowds, taken, strict=True):
            tokens = np.full(streams, turn % 256, np.int32)
            # The order alternates, so that both ways get every position within a chunk.
            for way in ("batch", "loop") if turn % 2 else ("loop", "batch"):
                began = time.perf_counter()
                if way == "batch":
                    session.step_batch(crowd, tokens)
                else:
                    for stream, token in zip(crowd, tokens.tolist(), strict=True):
                        stream.step(token)
                if turn:
                    times[way].append(time.perf_counter() - began)
    return [
        {
            "threads": t,
            "batch_threads": b,
            "streams": streams,
            "batch_tokens_per_second": streams / statistics.fmean(times["batch"]),
            "loop_tokens_per_second": streams / statistics.fmean(times["loop"]),
        }
        for (t, b), times in zip(settings, taken, strict=True)
    ]


def judge(name: str, run: dict[str, Any], expected: int) -> list[str]:
    failures = []
    if run["different_streams"]:
        failures.append(f"{name}: streams {run['different_streams']} differ from being alone")
    if abs(run["rss_growth_bytes"] - expected) > SLACK_PART * expected + SLACK_BYTES:
        failures.append(f"{name}: memory grew by {run['rss_growth_bytes']:,} bytes where {expected:,} were expected")
    return failures


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--streams", type=click.IntRange(SAMPLES), default=1000, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=40, show_default=True, help="Tokens per stream.")
@click.option(
    "--budget-tokens", type=click.IntRange(1), default=3, show_default=True, help="Tokens per stream with a budget."
)
@click.option("--timed-streams", type=click.IntRange(1), default=200, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=16, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Result file to write.")
def main(
    bundle: Path, streams: int, tokens: int, budget_tokens: int, timed_streams: int, turns: int, output: Path | None
) -> None:
    busy, processors = others_busy(), cores()
    sequences = texts(streams, tokens)
    with titans_runtime.Session(bundle, threads=1) as session:
        state_bytes = session.stream().state_bytes
    budget = state_bytes * max(1, streams // 10)
    live = run_apart(bundle, sequences, 0)
    budgeted = run_apart(bundle, [sequence[:budget_tokens] for sequence in sequences], budget)
    settings = [(1, 1), (1, processors), (processors, 1), (processors, processors)]
    result = {
        "benchmark": "many-streams",
        "name": bundle.stem,
        "processors": processors,
        "others_busy": busy,
        **provenance(),
        "live": live,
        "budget_bytes": budget,
        "budgeted": budgeted,
        "speeds": speeds(bundle, list(dict.fromkeys(settings)), timed_streams, turns),
    }
    failures = judge("live", live, state_bytes * streams) + judge("budgeted", budgeted, budget)
    result["passed"] = not failures
    if output is not None:
        write(output, result)
    click.echo(f"{streams:,} streams of {state_bytes:,} bytes: memory grew by {live['rss_growth_bytes']:,} bytes")
    click.echo(
        f"with a budget of {budget:,}: by {budgeted['rss_growth_bytes']:,}; {budgeted['spilled']:,} spilled, "
        f"{budgeted['tokens_per_second']:,.0f} tokens/s"
    )
    for line in result["speeds"]:
        click.echo(
            f"threads={line['threads']}, batch_threads={line['batch_threads']}: batch "
            f"{line['batch_tokens_per_second']:,.0f} tokens/s, loop {line['loop_tokens_per_second']:,.0f}"
        )
    if failures:
        click.echo(f"[many-streams] streams failed: {'; '.join(failures)}", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
