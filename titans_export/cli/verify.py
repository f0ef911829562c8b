"""`titans-export verify`: a bundle compared with its golden outputs or with the checkpoint in PyTorch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckpointError, MismatchError, UsageError
from .command import Command, emit, json_option, note, say
from .kinds import check_bundle
from .options import (
    PATH,
    SessionOptions,
    bundle_argument,
    check_finite,
    config_option,
    encoding_option,
    engine_option,
    open_session,
    session_options,
    weights_option,
)
from .progress import progress_bar
from .table import number, table
from .verbosity import details

if TYPE_CHECKING:
    import titans_runtime

    from ..boundaries import BoundaryReport
    from ..bundle import Bundle
    from ..graph_check import OutputCheck
    from ..output_limits import OutputLimits
    from ..verifying import Reference, Tokens, VerifyReport


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(SessionOptions):
    """The options of `verify`; `against` None compares with the golden outputs."""

    bundle: Path
    against: Path | None
    config: str | None
    weights: str | None
    text: Path | None
    encoding_errors: str
    tokens: int
    tolerance: float | None
    cuts: int
    polygraphy: bool
    boundaries: bool
    details: bool
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export verify mac.titans",
        "titans-export verify mac.titans --against checkpoints/mac --text book.txt --tokens 50000",
        "titans-export verify mac.titans --polygraphy --json",
        "titans-export verify mac.titans --boundaries --details",
    ),
)
@bundle_argument
@click.option(
    "--against",
    type=PATH,
    metavar="CHECKPOINT",
    help="Compare with this checkpoint in PyTorch, float32.  [default: the golden outputs]",
)
@config_option
@weights_option
@click.option("--text", type=PATH, help="Text to compare over, with --against; - for stdin.  [default: random tokens]")
@encoding_option
@click.option("--tokens", type=click.IntRange(1), default=10_000, help="Maximum number of tokens to compare over.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Maximum absolute difference of an output.  [default: the bundle's own]",
)
@click.option("--cuts", type=click.IntRange(0), default=0, metavar="SEED", help="Seed of random cuts and tokens.")
@click.option("--polygraphy", is_flag=True, help="Also compare each graph in ONNX Runtime and in ONNX's reference.")
@click.option(
    "--boundaries",
    is_flag=True,
    help="Instead, cut, fork, rewind, restore and batch streams around the ends of chunks, segments and windows.",
)
@click.option("--details", is_flag=True, help="With --boundaries, list the boundaries and every fault.")
@engine_option
@session_options
@json_option
def verify(**values: Any) -> None:
    """Check that a bundle computes the same outputs as PyTorch.

    The runtime reads one stream three times: whole, token by token, and in random cuts. Every output is compared with
    the golden outputs in BUNDLE or, with --against, with the checkpoint in PyTorch. Exit code 3 if a difference exceeds
    the tolerance. To compare two bundles, see titans-export compare.

    With --boundaries, streams are cut, forked, marked and rewound, saved and restored, and batched at n*C-1, n*C and
    n*C+1, for each period C of the bundle. Each must continue as a lone stream does.
    """
    _verify(VerifyOptions(**values))


def _verify(options: VerifyOptions) -> None:
    check_finite("verify", "--tolerance", options.tolerance)
    if options.text is not None and options.against is None:
        raise UsageError("E0103", "verify", "--text needs --against", "name the checkpoint to compare with")
    if options.boundaries and options.polygraphy:
        raise UsageError("E0102", "verify", "--boundaries excludes --polygraphy", "run the command twice")
    if options.details and not options.boundaries:
        raise UsageError("E0103", "verify", "--details needs --boundaries", "leave it out")
    from ..bundle import MANIFEST, read_bundle

    if options.against is not None and (options.against / MANIFEST).is_file():
        raise UsageError(
            "E0102",
            "verify",
            f"--against takes a checkpoint, and {options.against} is a bundle",
            f"compare two bundles with titans-export compare {options.bundle} {options.against}",
        )
    check_bundle(options.bundle)
    from ..verifying import verify_stream

    bundle = read_bundle(options.bundle)
    limits = bundle.limits(options.tolerance)
    session = open_session(options.bundle, options)
    stream, reference = (
        _golden(bundle, options.tokens)
        if options.against is None
        else _pytorch(bundle, session, options, options.against)
    )
    if options.boundaries:
        _boundaries(options, bundle, session, limits, stream, reference)
        return
    with progress_bar("verifying", len(stream), "tok") as advance:
        report = verify_stream(session, stream, reference, limits, options.cuts, advance)
    for name in report.unused_graphs:
        note(f"graph {name} did not run: {report.positions} tokens are too few for it")
    checks = _check_graphs(bundle, limits.tolerance) if options.polygraphy else None

    passed = report.passed and all(check.passed for check in checks or [])
    if options.as_json:
        emit(_as_json(options, session, report, limits, checks, passed))
    else:
        _print(options, bundle, report, limits, checks)
    if not passed:
        raise _mismatch(options.bundle, report, checks or [])


def _boundaries(
    options: VerifyOptions,
    bundle: Bundle,
    session: titans_runtime.Session,
    limits: OutputLimits,
    stream: Tokens,
    reference: Reference,
) -> None:
    """The whole of `--boundaries`. Raises MismatchError for a fault."""
    from ..boundaries import DELTAS, periods_of, verify_boundaries

    fast = open_session(options.bundle, options, batch="fast")
    total = len(DELTAS) * len(stream)
    with progress_bar("sweeping boundaries", total, "tok") as advance:
        report = verify_boundaries(
            (session, fast), periods_of(bundle.manifest), stream, reference, limits, options.cuts, advance
        )
    for period, several in report.periods.items():
        if not several:
            note(f"period {period} was not reached: {report.positions} tokens are too few for it")
    if options.as_json:
        emit(_boundaries_as_json(options, session, report))
    else:
        _print_boundaries(options, report)
    if not report.passed:
        first, more = report.faults[0], len(report.faults) - 1
        also = f" and {more} more faults" if more else ""
        raise MismatchError(
            "E0912",
            "verify",
            f"streams of {options.bundle} differ at a boundary: {first.operation.replace('_', ' ')} at position "
            f"{first.boundary} ({first.at}), first wrong output {first.position}: {first.problem}{also}",
            "see all faults with --details, and report them with the bundle's inspect --json",
        )


def _boundaries_as_json(
    options: VerifyOptions, session: titans_runtime.Session, report: BoundaryReport
) -> dict[str, Any]:
    return {
        "bundle": str(options.bundle),
        "against": "golden" if options.against is None else str(options.against),
        "memory_kernel": session.info["memory_kernel"],
        "passed": report.passed,
        "positions": report.positions,
        "tolerance": report.tolerance,
        "periods": report.periods,
        "boundaries": report.boundaries,
        "streams_per_call": report.streams_per_call,
        "operations": {
            name: {
                "passed": operation.passed,
                "checks": operation.checks,
                "max_abs_error": operation.max_abs_error,
                "faults": [dataclasses.asdict(fault) for fault in operation.faults],
            }
            for name, operation in report.operations.items()
        },
    }


def _print_boundaries(options: VerifyOptions, report: BoundaryReport) -> None:
    verdict = "passed" if report.passed else f"FAILED, {len(report.faults)} faults"
    periods = ", ".join(str(period) for period, several in report.periods.items() if several) or "none"
    say(f"{options.bundle}: {verdict}; {len(report.boundaries)} boundaries of the periods {periods}")
    rows = [
        (name.replace("_", " "), one.checks, number(one.max_abs_error), len(one.faults))
        for name, one in report.operations.items()
    ]
    say("\n" + table(("operation", "checks", "max error", "faults"), rows))
    if report.streams_per_call == 1:
        say("\nfast batches run as exact ones here: one stream per call")
    if not options.details:
        return
    multiples = [(period, " ".join(map(str, several)) or "-") for period, several in report.periods.items()]
    say("\n" + table(("period", "multiples"), multiples))
    if report.faults:
        faults = [(f.boundary, f.at, f.operation.replace("_", " "), f.position, f.problem) for f in report.faults]
        say("\n" + table(("boundary", "at", "operation", "first wrong output", "problem"), faults))


def _golden(bundle: Bundle, count: int) -> tuple[Tokens, Reference]:
    golden = bundle.golden()
    return golden.inputs[:count], golden


def _pytorch(
    bundle: Bundle, session: titans_runtime.Session, options: VerifyOptions, source: Path
) -> tuple[Tokens, Reference]:
    import numpy as np

    from ..checkpoints import load_checkpoint, options_of
    from ..verifying import PyTorch

    described = bundle.manifest.model
    load = options_of(described, options.config, options.weights)
    checkpoint = load_checkpoint(source, described.checkpoint_format, load)
    signal = checkpoint.model.input
    if (signal.kind, signal.size) != (session.input_kind, session.input_size):
        wanted, got = (
            f"a vocabulary of {size}" if kind == "tokens" else f"vectors of {size}"
            for kind, size in ((session.input_kind, session.input_size), (signal.kind, signal.size))
        )
        raise CheckpointError(
            "E0305",
            "verify",
            f"{source} is of another model: expected {wanted}, got {got}",
            "give the checkpoint that the bundle was exported from",
        )
    if described.weights_sha256 not in (None, checkpoint.weights_sha256):
        note(f"the weights of {source} differ from those {bundle.path} was exported from")
    rng, count = np.random.default_rng(options.cuts), options.tokens
    if signal.kind == "vectors":
        if options.text is not None:
            raise UsageError("E0106", "verify", f"{bundle.path} takes vectors, not text", "leave out --text")
        tokens = rng.standard_normal((count, signal.size), np.float32)
    elif options.text is None:
        tokens = rng.integers(0, session.vocab_size, count, np.int32)
    else:
        from ..tokenizer import open_tokenizer, read_tokens

        encoding = session.vocab_size, options.encoding_errors
        tokenizer = open_tokenizer(bundle.manifest.tokenizer, bundle.path, *encoding)
        return read_tokens(options.text, tokenizer, count)[0], PyTorch(checkpoint.model)
    return tokens, PyTorch(checkpoint.model)


def _check_graphs(bundle: Bundle, tolerance: float) -> list[OutputCheck]:
    from ..graph_check import check_graphs

    note("comparing every graph in ONNX Runtime and in ONNX's reference evaluator")
    return check_graphs(bundle, tolerance)


def _as_json(
    options: VerifyOptions,
    session: titans_runtime.Session,
    report: VerifyReport,
    limits: OutputLimits,
    checks: list[OutputCheck] | None,
    passed: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "bundle": str(options.bundle),
        "against": "golden" if options.against is None else str(options.against),
        "memory_kernel": session.info["memory_kernel"],
        "passed": passed,
        "max_abs_error": report.max_abs_error,
        "first_bad_position": report.first_bad_position,
        "positions": report.positions,
        "tolerance": report.tolerance,
        "stability": limits.stability.to_json() if limits.stability else None,
        "pytorch_float32_to_float64": report.pytorch_float32_to_float64,
        "graphs": report.graphs,
        "feeds": {name: dataclasses.asdict(distance) for name, distance in report.feeds.items()},
    }
    if checks is not None:
        result["polygraphy"] = [{**dataclasses.asdict(check), "passed": check.passed} for check in checks]
    return result


def _print(
    options: VerifyOptions,
    bundle: Bundle,
    report: VerifyReport,
    limits: OutputLimits,
    checks: list[OutputCheck] | None,
) -> None:
    """The verdict, and the tables behind it if something failed or the user wants details."""
    from ..output_limits import describe

    passed = report.passed and all(check.passed for check in checks or [])
    reference = "golden outputs" if options.against is None else f"{options.against} in PyTorch float32"
    say(
        f"{'passed' if passed else 'FAILED'}: {options.bundle} against {reference}, {report.positions:,} tokens, "
        f"max error {number(report.max_abs_error)} (tolerance {number(report.tolerance)})"
    )
    if limits.stability is not None:
        say(describe(limits.stability))
    if bundle.quantization is not None and options.tolerance is None:
        say("The tolerance is this bundle's own rounding. titans-export compare measures how far it drifts.")
    if checks is not None:
        bad = sum(not check.passed for check in checks)
        say(f"polygraphy: {len(checks) - bad:,} of {len(checks):,} outputs agree")
    if not passed or details():
        say("")
        _print_details(report, checks)


def _print_details(report: VerifyReport, checks: list[OutputCheck] | None) -> None:
    rows = [
        (name.replace("_", " "), number(d.max_abs_error), "-" if d.first_bad_position is None else d.first_bad_position)
        for name, d in report.feeds.items()
    ]
    say(table(("feed", "max error", "first bad position"), rows))
    say("\n" + table(("graph", "calls"), list(report.graphs.items())))
    if report.pytorch_float32_to_float64 is not None:
        say(f"\nPyTorch float32 to float64: {number(report.pytorch_float32_to_float64)}")
    if checks is not None:
        say("\n" + table(("graph", "output", "max error", "passed"), [_row(check) for check in checks]))


def _row(check: OutputCheck) -> tuple[object, ...]:
    return check.graph, check.output, number(check.max_abs_error), "yes" if check.passed else "NO"


def _mismatch(bundle: Path, report: VerifyReport, checks: list[OutputCheck]) -> MismatchError:
    if report.passed:
        bad = next(check for check in checks if not check.passed)
        got = f"{number(bad.max_abs_error)} in output {bad.output} of graph {bad.graph}"
    else:
        got = f"{number(report.max_abs_error)}, first exceeded at position {report.first_bad_position}"
    return MismatchError(
        "E0901",
        "verify",
        f"outputs of {bundle} differ: expected at most {number(report.tolerance)}, got {got}",
        "export the bundle again, or allow for the difference with --tolerance",
    )
