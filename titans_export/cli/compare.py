"""`titans-export compare`: how far a bundle drifts from another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from ..files import check_file, replacing_file
from .command import Command, emit, json_option, note, say, to_json
from .kinds import check_bundle
from .options import (
    PATH,
    SessionOptions,
    bundle_argument,
    check_finite,
    encoding_option,
    engine_option,
    open_session,
    session_options,
)
from .progress import progress_bar
from .table import number, table

if TYPE_CHECKING:
    from ..drift.report import Report


@dataclass(frozen=True, kw_only=True)
class CompareOptions(SessionOptions):
    """The options of `compare`. The `reference_*` options of None follow those of the bundle."""

    bundle: Path
    reference: Path
    text: Path | None
    encoding_errors: str
    tokens: int | None
    seed: int
    tolerance: float | None
    bits_tolerance: float | None
    window: int
    stream_length: int | None
    layers: int
    recall: int
    recall_task: str | None
    output: Path | None
    html: Path | None
    reference_device: str | None
    reference_backend: str | None
    reference_engine: str | None
    reference_memory_kernel: str | None
    as_json: bool

    def reference_session(self) -> SessionOptions:
        """Where the reference runs. The engine is shared only if both are the same bundle."""
        same = self.bundle.resolve() == self.reference.resolve()
        return SessionOptions(
            device=self.reference_device or self.device,
            backend=self.reference_backend or self.backend,
            threads=self.threads,
            memory_kernel=self.reference_memory_kernel or self.memory_kernel,
            engine=self.engine if self.reference_engine is None and same else self.reference_engine,
        )


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export compare int8.titans mac.titans --text book.txt --bits-tolerance 1 --html drift.html",
        "titans-export compare mac.titans mac.titans --reference-memory-kernel off --tolerance 1e-3",
        "titans-export compare int8.titans mac.titans --text book.txt --json",
    ),
)
@bundle_argument
@click.argument("reference", type=PATH)
@click.option("--text", type=PATH, help="Text to compare over, - for stdin.  [default: random tokens]")
@encoding_option
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Maximum number of tokens to compare over.  [default: the whole text, or 100000]",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of random tokens and of the recall measurement.")
@click.option(
    "--tolerance", type=click.FloatRange(0), help="Maximum absolute difference of an output.  [default: no limit]"
)
@click.option(
    "--bits-tolerance",
    type=click.FloatRange(0),
    metavar="PERCENT",
    help="Maximum increase of a window's bits.  [default: no limit]",
)
@click.option("--window", type=click.IntRange(1), default=32_768, help="Tokens per window.")
@click.option("--stream-length", type=click.IntRange(1), help="Tokens per stream.  [default: one stream]")
@click.option(
    "--layers",
    type=click.IntRange(0),
    default=4096,
    metavar="TOKENS",
    help="Compare layers over this many tokens; 0: skip.",
)
@click.option(
    "--recall",
    type=click.IntRange(0),
    default=1024,
    metavar="DISTANCE",
    help="Measure recall up to this distance; 0: skip.",
)
@click.option(
    "--recall-task",
    type=click.Choice(("strings", "pairs")),
    help="Task of the recall measurement.  [default: chosen by the model]",
)
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Also write the JSON object to this file.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a report with plots to this file.")
@click.option("--reference-device", metavar="TEXT", help="Device of REFERENCE.  [default: --device]")
@click.option("--reference-backend", metavar="TEXT", help="Backend of REFERENCE.  [default: --backend]")
@click.option(
    "--reference-engine", metavar="TEXT", help="Engine of REFERENCE.  [default: --engine, if it is the same bundle]"
)
@click.option(
    "--reference-memory-kernel",
    type=click.Choice(("auto", "require", "off")),
    help="Memory kernel of REFERENCE.  [default: --memory-kernel]",
)
@engine_option
@session_options
@json_option
def compare(**values: Any) -> None:
    """Measure how far a bundle drifts from another one.

    BUNDLE and REFERENCE read the same tokens. Their predictions and memories are compared window by window. REFERENCE
    may be the same bundle on another device, backend, engine or kernel. Exit code 3 if --tolerance or --bits-tolerance
    is exceeded.
    """
    _compare(CompareOptions(**values))


def _compare(options: CompareOptions) -> None:
    check_finite("compare", "--tolerance", options.tolerance)
    check_finite("compare", "--bits-tolerance", options.bits_tolerance)
    for path in (options.output, options.html):
        check_file(path)
    if options.html is not None:
        import matplotlib  # noqa: F401  # fails before the long measurement if it is missing

    check_bundle(options.bundle)
    check_bundle(options.reference)
    from ..drift.measure import Options, measure

    session = open_session(options.bundle, options)
    reference = open_session(options.reference, options.reference_session())
    measured = Options(
        text=options.text,
        tokens=options.tokens,
        seed=options.seed,
        window=options.window,
        stream_length=options.stream_length,
        tolerance=options.tolerance,
        bits_tolerance=options.bits_tolerance,
        layer_tokens=options.layers,
        longest_recall=options.recall,
        recall_task=options.recall_task,
        encoding_errors=options.encoding_errors,
    )
    with progress_bar("comparing", options.tokens, "tok") as advance:
        report = measure(options.bundle, session, options.reference, reference, measured, advance, note)
    result = report.to_json()

    if options.output is not None:
        with replacing_file(options.output) as aside:
            aside.write_text(to_json(result) + "\n", encoding="utf-8")
    if options.html is not None:
        from ..drift.page import render

        with replacing_file(options.html) as aside:
            aside.write_text(render(result), encoding="utf-8")
    if options.as_json:
        emit(result)
    else:
        _print(report)
    if not report.drift.passed:
        raise _drifted(options, report)


def _print(report: Report) -> None:
    """The verdict, windows, memories, layers and recall."""
    drift = report.drift
    say(report.verdict())
    if drift.windows:
        bits = drift.bits is not None
        columns = ("reference bits", "bits", "increase", "KL", "top-1 agreement") if bits else ()
        rows = []
        for window in drift.windows:
            own: tuple[object, ...] = ()
            if bits:
                own = (
                    f"{window.reference_bits:.4f}",
                    f"{window.bits:.4f}",
                    f"{window.bits_difference or 0:.3%}",
                    number(window.kl_mean),
                    f"{window.top1_agreement:.2%}",
                )
            rows.append((window.start, *own, number(window.mean_abs_error), number(window.max_abs_error)))
        say("\n" + table(("from", *columns, "mean error", "max error"), rows))
    last = [entry for entry in drift.memory if entry.position == drift.memory[-1].position]
    if last:
        rows = [(entry.layer, number(entry.weights), number(entry.surprise)) for entry in last]
        say("\n" + table(("memory at the end", "distance of W", "distance of S"), rows))
    if report.layers:
        rows = [(error.layer, error.what, number(error.relative_error)) for error in report.layers]
        say("\n" + table(("layer", "values", "relative error"), rows))
    if report.recall:
        what = "answers right" if report.recall_task == "pairs" else "bits saved"
        rows = [(entry.distance, f"{entry.reference:.3f}", f"{entry.value:.3f}") for entry in report.recall]
        say("\n" + table(("recall distance", f"reference {what}", what), rows))


def _drifted(options: CompareOptions, report: Report) -> MismatchError:
    drift = report.drift
    limits = []
    if options.tolerance is not None:
        limits.append(f"an error of at most {number(options.tolerance)}")
    if options.bits_tolerance is not None:
        limits.append(f"at most {options.bits_tolerance:g} % more bits")
    got = number(drift.max_abs_error)
    if drift.bits_difference is not None:
        got += f", bits {drift.bits_difference:+.3%}"
    return MismatchError(
        "E0902",
        "compare",
        f"{options.bundle} drifts from {options.reference}: expected {' and '.join(limits)}, got {got}, "
        f"first exceeded at position {drift.first_bad_position}",
        "choose a finer recipe, or allow for the difference",
    )
