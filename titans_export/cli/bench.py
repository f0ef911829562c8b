"""`titans-export bench`: the speed of a bundle against baselines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench import KINDS
from ..errors import MachineError, MismatchError, UsageError
from ..files import check_file, replacing_file
from .command import Command, emit, json_option, note, say, to_json
from .kinds import check_bundle
from .options import PATH, SessionOptions, bundle_argument, config_option, open_session, session_options, weights_option
from .table import number, size, table

if TYPE_CHECKING:
    from ..bench.comparison import Plan, Result


@dataclass(frozen=True, kw_only=True)
class BenchOptions(SessionOptions):
    """The options of `bench`; `against` is a checkpoint to measure in PyTorch."""

    bundle: Path
    against: Path | None
    config: str | None
    weights: str | None
    tokens: int
    decode_tokens: int
    rounds: int
    output: Path | None
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    foreign=False,
    examples=(
        "titans-export bench mac.titans",
        "titans-export bench mac.titans --against checkpoints/mac --json",
        "titans-export bench mac.titans --tokens 16384 --rounds 30 --threads 1 --output mac.json",
    ),
)
@bundle_argument
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="Also measure this checkpoint in PyTorch.")
@config_option
@weights_option
@click.option("--tokens", type=click.IntRange(1), default=4096, help="Minimum number of tokens per prefill pass.")
@click.option("--decode-tokens", type=click.IntRange(1), default=256, help="Minimum number of tokens per decode pass.")
@click.option("--rounds", type=click.IntRange(1), default=15, help="Rounds per baseline.")
@click.option("--output", type=PATH, metavar="FILE", help="Also write the JSON object to this file.")
@session_options
@json_option
def bench(**values: Any) -> None:
    """Measure the speed of a bundle against baselines.

    The baselines are the runtime with its memory kernel, the runtime with standard operators and, with --against,
    PyTorch, eager and compiled. Each runs in its own process, interleaved with the others. Each must reproduce the
    golden outputs in BUNDLE first: if one does not, the exit code is 3 and no speed is reported.
    """
    _bench(BenchOptions(**values))


def _bench(options: BenchOptions) -> None:
    bundle, against = options.bundle, options.against
    if against is not None and options.device != "cpu":
        problem = f"--against measures PyTorch on the CPU, and --device is {options.device}"
        raise UsageError("E0102", "bench", problem, "leave out one of them")
    check_file(options.output)
    check_bundle(bundle)
    from ..bench.comparison import Plan, baselines, compare
    from ..bench.machine import QUIET, cores, others_busy
    from ..bundle import read_bundle

    opened = read_bundle(bundle)
    if opened.takes_vectors:
        raise UsageError("E0106", "bench", f"{bundle} takes vectors, not tokens", "measure Stream.feed in Python")
    # Opened here first, so that the command fails with the runtime's own error.
    open_session(bundle, options).close()
    plan = Plan.of(opened, options.tokens, options.decode_tokens, options.rounds, options.threads or cores())
    chosen = baselines(
        bundle,
        options.device,
        options.backend,
        plan.threads,
        options.memory_kernel,
        against,
        opened.manifest.model,
        options.config,
        options.weights,
    )
    busy = others_busy()
    if busy > QUIET:
        note(f"other programs keep {busy:.0%} of this machine busy: the results are unreliable")
    results = compare(opened, chosen, plan, note)

    report = _as_json(bundle, against, options.device, plan, opened.tolerance, results) | {"others_busy": busy}
    if options.output is not None:
        with replacing_file(options.output) as aside:
            aside.write_text(to_json(report) + "\n", encoding="utf-8")
    if options.as_json:
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
        "baselines": [_baseline(result) for result in results],
        "machine": describe_machine(),
        "packages": describe_packages(),
    }


def _baseline(result: Result) -> dict[str, Any]:
    return {
        "name": result.baseline.name,
        "what": result.baseline.what,
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
    """Ratios first, then speeds, then baselines that are incorrect or unavailable."""
    measured = [result for result in results if result.speeds]
    for kind, others in ratios.items():
        texts = [f"{value:.2f} times as fast as {name}" for name, value in others.items()]
        say(f"{kind}: {measured[0].baseline.name} is " + ", ".join(texts))
    for kind in KINDS if measured else ():
        count = plan.prefill_tokens if kind == "prefill" else plan.decode_tokens
        say(f"\n{kind}, {count} tokens per pass, {plan.rounds} rounds, {plan.threads} threads\n")
        header = (
            "baseline",
            "tokens/s",
            "slowest round",
            "fastest",
            "p50 us",
            "p90 us",
            "p99 us",
            "state",
            "peak memory",
        )
        say(table(header, [_row(result, kind) for result in measured]))
    red = [result for result in results if result.passed is False]
    if red:
        rows = [(r.baseline.name, number(r.max_abs_error), r.first_bad_position) for r in red]
        say(table(("incorrect baseline", "max error", "first bad position"), rows))
    for result in results:
        for name, text in result.notes.items():
            say(f"{result.baseline.name}: {name.replace('_', ' ')}: {text}")
        if result.unavailable:
            say(f"{result.baseline.name} is unavailable: {result.unavailable}")


def _row(result: Result, kind: str) -> tuple[object, ...]:
    speed = result.speeds[kind]
    rates = (speed.tokens_per_second, speed.slowest_round, speed.fastest_round)
    times = (speed.p50_us, speed.p90_us, speed.p99_us)
    return (
        result.baseline.name,
        *(f"{rate:,.0f}" for rate in rates),
        *(f"{time:,.1f}" for time in times),
        size(result.state_bytes or 0),
        size(result.peak_rss_bytes or 0),
    )


def _check(bundle: Path, tolerance: float, results: list[Result]) -> None:
    """Raises MismatchError for an incorrect baseline, MachineError if none is available."""
    red = next((result for result in results if result.passed is False), None)
    if red is not None:
        raise MismatchError(
            "E0907",
            "bench",
            f"{red.baseline.name} differs from the golden outputs of {bundle}: expected at most {number(tolerance)}, "
            f"got {number(red.max_abs_error)}, first exceeded at position {red.first_bad_position}",
            "find the cause with titans-export verify",
        )
    if not any(result.passed for result in results):
        problem = f"no baseline can run the bundle: {results[0].unavailable}"
        raise MachineError("E0908", "bench", problem, "see titans-export doctor")
