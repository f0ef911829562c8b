"""Benchmarks one memory layer: the speed of each baseline, and its share of the machine's limits.

    python -m benchmarks.layer                                      all rows and baselines
    python -m benchmarks.layer --row mlp-decode --baseline kernel --baseline torch-compile --rounds 5

Each baseline's answer is first compared with a float64 recurrence. An incorrect baseline is reported without a speed;
the exit code is 3.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import limits, report, table
from benchmarks.baselines import BASELINES, display
from benchmarks.case import Case, rows
from benchmarks.reference import TOLERANCE, errors, recurrence
from titans_export.bench.interleaved import interleave
from titans_export.bench.machine import QUIET, cores, others_busy
from titans_export.bench.statistics import Speed, summarise
from titans_export.bench.worker import Worker, WorkerError

WRONG = 3
# Approximate duration of one timed block, which has at least one pass.
TURN_S = 0.25
MOST_PASSES = 50
# The limit that bounds each kind of row.
BOUND_BY = {"prefill": "sgemm", "mac": "sgemm", "decode": "read bandwidth"}


def measure_row(case: Case, names: list[str], rounds: int) -> dict[str, Any]:
    """Checks the baselines of one row, and measures the correct ones."""
    right = recurrence(case)
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in names:
            _say(f"{case.name}: preparing and checking {display(name)}")
            try:
                worker, entry = _prepare(case, name, right, stack)
            except WorkerError as error:
                entry = {"name": display(name), "unavailable": str(error), "passed": None}
            else:
                if entry["passed"] is not False:
                    workers[display(name)] = worker
            found.append(entry)
        _say(f"{case.name}: {rounds} rounds of {len(workers)} baselines")
        speeds = _measure(case, workers, rounds)
        for entry in found:
            if (name := entry["name"]) in speeds:
                entry |= {"speed": dataclasses.asdict(speeds[name]), **workers[name].call("memory")}
    return {
        "name": case.name,
        "ratios": ratios({name: speed.tokens_per_second for name, speed in speeds.items()}),
        "bound_by": BOUND_BY[case.kind],
        **dataclasses.asdict(case),
        "flop_per_token": case.flop_per_token,
        "decode_bytes_per_token": case.decode_bytes_per_token,
        "decode_working_set": case.decode_working_set,
        "baselines": found,
    }


def _prepare(case: Case, name: str, right: Any, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
    began = time.monotonic()
    worker = stack.enter_context(Worker("benchmarks.baselines:make", name, case, threads=case.threads))
    what, same_mathematics = worker.call("about")
    notes = worker.call("prepare")
    entry: dict[str, Any] = {
        "name": display(name),
        "what": what,
        "unavailable": None,
        "same_mathematics": same_mathematics,
        "passed": None,
        "errors": {},
        "setup_s": time.monotonic() - began,
        "notes": notes,
    }
    if same_mathematics:
        entry["errors"] = errors(worker.call("answer"), right)
        entry["passed"] = max(entry["errors"].values()) <= TOLERANCE
    return worker, entry


def _measure(case: Case, workers: dict[str, Worker], rounds: int) -> dict[str, Speed]:
    passes = {}
    for name, worker in workers.items():
        worker.call("start")
        seconds = sum(worker.call("run_passes", 1)[0]) / 1e9
        passes[name] = min(MOST_PASSES, max(1, round(TURN_S / seconds)))
    timed = interleave({name: partial(w.call, "run_passes", passes[name]) for name, w in workers.items()}, rounds)
    return {name: summarise(own, case.streams * case.tokens) for name, own in timed.items()}


def share(case: Case, tokens_per_second: float, limit: dict[str, Any]) -> float:
    """The share of the row's limit that this many tokens per second, over all streams, reach."""
    rate = tokens_per_second / case.streams
    if case.kind == "decode":
        peak: float = limit["bandwidth_gb_s"][str(case.decode_working_set)]["read"]
        return rate * case.decode_bytes_per_token / (peak * 1e9)
    peak = limit["sgemm_gflops"]
    return rate * case.flop_per_token / (peak * 1e9)


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """Speed of the first baseline, divided by that of each other one."""
    first, *others = list(rates) or [""]
    return {other: rates[first] / rates[other] for other in others}


def _say(text: str) -> None:
    click.echo(f"benchmarks: {text}", err=True)


@click.command(help=__doc__)
@click.option("--row", "chosen_rows", multiple=True, help="Measure only this row; repeatable.")
@click.option("--baseline", "chosen", multiple=True, help="Run only this baseline, by name or module; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds per baseline.")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--hidden", type=click.IntRange(1), default=256, show_default=True, help="Hidden width of the MLP.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--streams", type=click.IntRange(1), default=1, show_default=True)
@click.option("--chunk", type=click.IntRange(1), default=64, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens per prefill pass.")
@click.option("--decode-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens per decode pass.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads per baseline.  [default: all cores]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Result file to write.")
def main(
    chosen_rows: tuple[str, ...],
    chosen: tuple[str, ...],
    rounds: int,
    head_dim: int,
    hidden: int,
    heads: int,
    streams: int,
    chunk: int,
    tokens: int,
    decode_tokens: int,
    threads: int,
    output: Path | None,
) -> None:
    if tokens % chunk or decode_tokens % chunk:
        raise click.UsageError("--tokens and --decode-tokens have to be multiples of --chunk")
    threads = threads or cores()
    cases = rows(head_dim, hidden, streams, heads, chunk, tokens, decode_tokens, threads)
    available = [case.name for case in cases]
    cases = [case for case in cases if case.name in chosen_rows or not chosen_rows]
    known = {display(name): name for name in BASELINES}
    names = [known.get(name, name) for name in chosen] or list(BASELINES)
    if unknown := [name for name in names if name not in BASELINES and "." not in name]:
        raise click.UsageError(f"no baseline {unknown[0]}; there are {', '.join(known)}")
    if not cases:
        raise click.UsageError(f"no such row; there are {', '.join(available)}")
    _say("measuring the machine's limits")
    before = limits.measure(cases, threads)
    busy, measured = list[float](), list[dict[str, Any]]()
    try:
        for case in cases:
            busy.append(others_busy())
            if busy[-1] > QUIET:
                _say(f"others keep {busy[-1]:.0%} of this machine busy: expect little of these numbers")
            measured.append(measure_row(case, names, rounds))
    except WorkerError as error:
        raise click.ClickException(f"a baseline that passed failed while it was measured: {error}") from error
    _say("measuring the machine's limits again")
    limit = limits.best(before, limits.measure(cases, threads))
    for row, case in zip(measured, cases, strict=True):
        for entry in row["baselines"]:
            if "speed" in entry:
                entry["share_of_limit"] = share(case, entry["speed"]["tokens_per_second"], limit)
    result = {
        "benchmark": "layer",
        "ratios": {row["name"]: row["ratios"] for row in measured},
        "passed": all(entry["passed"] is not False for row in measured for entry in row["baselines"]),
        "tolerance": TOLERANCE,
        "threads": threads,
        "others_busy": max(busy),
        "limits": limit,
        **report.provenance(),
        "rows": measured,
    }
    if output is not None:
        report.write(output, result)
    click.echo(table.layer_ratios(result) + "\n\n" + table.layer_speeds(result))
    if not result["passed"]:
        sys.exit(WRONG)


if __name__ == "__main__":
    main()
