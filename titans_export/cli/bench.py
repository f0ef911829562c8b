"""`titans-export bench`: how fast a bundle runs, side by side with what else can run the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench import KINDS
from ..errors import MachineError, MismatchError, OutputError, UsageError
from .command import Command, emit, json_option, note, to_json
from .options import PATH, bundle_argument, config_option, open_session, session_options
from .table import number, size, table

if TYPE_CHECKING:
    from ..bench.comparison import Plan, Result


@click.command(
    cls=Command,
    examples=(
        "titans-export bench mac.titans",
        "titans-export bench mac.titans --against checkpoints/mac --json",
        "titans-export bench mac.titans --tokens 16384 --rounds 30 --threads 1 --output mac.json",
    ),
)
@bundle_argument
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="Also measure this checkpoint in PyTorch.")
@config_option
@click.option("--tokens", type=click.IntRange(1), default=4096, help="Tokens of a pass of prefill, at least.")
@click.option("--decode-tokens", type=click.IntRange(1), default=256, help="Tokens of a pass of decode, at least.")
@click.option("--rounds", type=click.IntRange(1), default=15, help="Turns that each contender gets.")
@click.option("--output", type=PATH, metavar="FILE", help="Also write the JSON object to this file.")
@session_options
@json_option
def bench(
    bundle: Path,
    against: Path | None,
    config: str | None,
    tokens: int,
    decode_tokens: int,
    rounds: int,
    output: Path | None,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    as_json: bool,
) -> None:
    """Measure how fast a bundle runs, side by side with what else can run the model.

    The runtime with its memory kernel, the runtime with the memory as standard operators and, with --against, PyTorch,
    eager and compiled, each in a process of its own, take turns. First each has to reproduce the golden logits in
    BUNDLE: if one does not, the exit code is 3 and no speed is reported.
    """
    if against is not None and device != "cpu":
        raise UsageError(
            "bench", "--device cpu with --against", device, "leave one of them out: PyTorch runs on the CPU"
        )
    if output is not None and not output.parent.is_dir():
        raise OutputError("output", f"a folder {output.parent}", "none", "create the folder first")
    from ..bench.comparison import Plan, compare, contenders
    from ..bench.machine import QUIET, cores, others_busy
    from ..bundle import read_bundle

    opened = read_bundle(bundle)
    if opened.takes_vectors:
        raise UsageError(
            "bench",
            "a bundle that takes tokens",
            f"{bundle}, which takes vectors",
            "measure its Stream.feed from Python",
        )
    # Opened here first: what the runtime cannot open is a failure of the command, with the runtime's own words.
    open_session(bundle, device, backend, threads, memory_kernel).close()
    plan = Plan.of(opened, tokens, decode_tokens, rounds, threads or cores())
    format = opened.manifest.model.checkpoint_format
    taking_part = contenders(bundle, device, backend, plan.threads, memory_kernel, against, format, config)
    busy = others_busy()
    if busy > QUIET:
        note(f"others keep {busy:.0%} of this machine busy: expect little of these numbers")
    results = compare(opened, taking_part, plan, note)

    report = _as_json(bundle, against, device, plan, opened.tolerance, results) | {"others_busy": busy}
    if output is not None:
        from ..files import replacing_file

        with replacing_file(output) as aside:
            aside.write_text(to_json(report) + "\n", encoding="utf-8")
    if as_json:
        emit(report)
    else:
        _print(plan, results, report["ratios"])
    _check(bundle, opened.tolerance, results)


def _as_json(
    bundle: Path, against: Path | None, device: str, plan: Plan, tolerance: float, results: list[Result]
) -> dict[str, Any]:
    from ..bench.comparison import ratios
    from ..bench.machine import describe_machine, describe_packages

    return {
        "bundle": str(bundle),
        "against": None if against is None else str(against),
        "device": device,
        "passed": all(result.passed for result in results if result.unavailable is None),
        "tolerance": tolerance,
        "ratios": ratios(results),
        **dataclasses.asdict(plan),
        "contenders": [_contender(result) for result in results],
        "machine": describe_machine(),
        "packages": describe_packages(),
    }


def _contender(result: Result) -> dict[str, Any]:
    return {
        "name": result.contender.name,
        "what": result.contender.what,
        "unavailable": result.unavailable,
        "passed": result.passed,
        "max_abs_error": result.max_abs_error,
        "first_bad_position": result.first_bad_position,
        **{kind: dataclasses.asdict(result.speeds[kind]) if kind in result.speeds else None for kind in KINDS},
        "state_bytes": result.state_bytes,
        "peak_rss_bytes": result.peak_rss_bytes,
        "setup_s": result.setup_s,
        "notes": result.notes,
    }


def _print(plan: Plan, results: list[Result], ratios: dict[str, dict[str, float]]) -> None:
    """Ratios first, then what they come from, then who could not take part."""
    measured = [result for result in results if result.speeds]
    for kind, others in ratios.items():
        texts = [f"{value:.2f} times as fast as {name}" for name, value in others.items()]
        click.echo(f"{kind}: {measured[0].contender.name} is " + ", ".join(texts))
    for kind in KINDS if measured else ():
        count = plan.prefill_tokens if kind == "prefill" else plan.decode_tokens
        click.echo(f"\n{kind}, {count} tokens a pass, {plan.rounds} rounds, {plan.threads} threads\n")
        header = ("contender", "tokens/s", "rounds from", "to", "p50 us", "p90 us", "p99 us", "state", "peak memory")
        click.echo(table(header, [_row(result, kind) for result in measured]))
    red = [result for result in results if result.passed is False]
    if red:
        rows = [(r.contender.name, number(r.max_abs_error), r.first_bad_position) for r in red]
        click.echo(table(("contender that failed", "max error", "first bad position"), rows))
    for result in results:
        for name, text in result.notes.items():
            click.echo(f"{result.contender.name}: {name.replace('_', ' ')}: {text}")
        if result.unavailable:
            click.echo(f"{result.contender.name} could not take part: {result.unavailable}")


def _row(result: Result, kind: str) -> tuple[object, ...]:
    speed = result.speeds[kind]
    rates = (speed.tokens_per_second, speed.slowest_round, speed.fastest_round)
    times = (speed.p50_us, speed.p90_us, speed.p99_us)
    return (
        result.contender.name,
        *(f"{rate:,.0f}" for rate in rates),
        *(f"{time:,.1f}" for time in times),
        size(result.state_bytes or 0),
        size(result.peak_rss_bytes or 0),
    )


def _check(bundle: Path, tolerance: float, results: list[Result]) -> None:
    """Raises where a contender is wrong, or where there is none."""
    red = next((result for result in results if result.passed is False), None)
    if red is not None:
        raise MismatchError(
            "bench",
            f"{red.contender.name} within {number(tolerance)} of the golden logits of {bundle}",
            f"{number(red.max_abs_error)}, the first too large at position {red.first_bad_position}",
            "no speed is reported; look into it with titans-export verify",
        )
    if not any(result.passed for result in results):
        raise MachineError("bench", "something that runs the bundle", str(results[0].unavailable), "see doctor")
