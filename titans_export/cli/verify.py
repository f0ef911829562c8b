"""`titans-export verify`: does a bundle compute what PyTorch computes, and how far does one drift from another?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckpointError, MismatchError, OutputError, UsageError
from .command import Command, emit, json_option, note, to_json
from .options import PATH, bundle_argument, config_option, engine_option, open_session, session_options
from .progress import progress_bar
from .table import number, table

if TYPE_CHECKING:
    import titans_runtime

    from ..bundle import Bundle
    from ..drift.report import Report
    from ..graph_check import OutputCheck
    from ..verify import Reference, Tokens, VerifyReport


_DEFAULT_TOKENS = 10_000


@click.command(
    cls=Command,
    examples=(
        "titans-export verify mac.titans",
        "titans-export verify mac.titans --against checkpoints/mac --text book.txt --tokens 50000",
        "titans-export verify int8.titans --against mac.titans --text book.txt --bits-tolerance 1 --html drift.html",
        "titans-export verify mac.titans --against mac.titans --against-memory-kernel off --tolerance 1e-3",
        "titans-export verify mac.titans --polygraphy --json",
    ),
)
@bundle_argument
@click.option(
    "--against",
    type=PATH,
    metavar="CHECKPOINT|BUNDLE",
    help="Compare with this checkpoint in PyTorch, float32, or with this bundle: how far BUNDLE drifts from it.",
)
@config_option
@click.option("--text", type=PATH, help="Text to compare over, with --against.  [default: random tokens]")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Tokens to compare over at most.  [default: 10000; against a bundle all of the text, or 100000]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest absolute difference of a logit.  [default: the bundle's own; against a bundle any]",
)
@click.option("--cuts", type=click.IntRange(0), default=0, metavar="SEED", help="Seed of random cuts and tokens.")
@click.option("--polygraphy", is_flag=True, help="Also compare each graph's ONNX Runtime with ONNX's NumPy reference.")
@click.option(
    "--bits-tolerance",
    type=click.FloatRange(0),
    metavar="PERCENT",
    help="Against a bundle: by how much the bits of a window may be larger.  [default: any]",
)
@click.option("--window", type=click.IntRange(1), help="Against a bundle: tokens of a window.  [default: 32768]")
@click.option(
    "--stream-length",
    type=click.IntRange(1),
    help="Against a bundle: fresh streams after so many tokens.  [default: one]",
)
@click.option(
    "--layers",
    type=click.IntRange(0),
    metavar="TOKENS",
    help="Against a bundle: tokens over which layers are compared, 0: none.  [default: 4096]",
)
@click.option(
    "--recall",
    type=click.IntRange(0),
    metavar="DISTANCE",
    help="Against a bundle: longest distance of the recall measurement, 0: none.  [default: 1024]",
)
@click.option(
    "--recall-task",
    type=click.Choice(("strings", "pairs")),
    help="Against a bundle: what is to be recalled.  [default: chosen by the model]",
)
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Against a bundle: also write the JSON object there.")
@click.option("--html", type=PATH, metavar="FILE", help="Against a bundle: write a page for people, with plots.")
@click.option("--against-device", metavar="TEXT", help="Where the other bundle runs.  [default: --device]")
@click.option("--against-backend", metavar="TEXT", help="The other bundle's backend.  [default: --backend]")
@click.option(
    "--against-engine", metavar="TEXT", help="The other bundle's engine.  [default: --engine, same bundle only]"
)
@click.option(
    "--against-memory-kernel",
    type=click.Choice(("auto", "require", "off")),
    help="What computes the other bundle's memory.  [default: --memory-kernel]",
)
@engine_option
@session_options
@json_option
def verify(
    bundle: Path,
    against: Path | None,
    config: str | None,
    text: Path | None,
    tokens: int | None,
    tolerance: float | None,
    cuts: int,
    polygraphy: bool,
    engine: str | None,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    as_json: bool,
    **drift: Any,
) -> None:
    """Check that a bundle computes what PyTorch computes, or how far it drifts from another bundle.

    The runtime reads a stream whole, token by token and in random cuts, and every logit is compared: with the golden
    logits in BUNDLE or, with --against CHECKPOINT, with the checkpoint in PyTorch. Exit code 3 if one is too far off.

    With --against BUNDLE both read the same text, and what they predict and what their memories hold is compared window
    by window. Exit code 3 if --tolerance or --bits-tolerance was given and did not hold.
    """
    for option, value in (("--tolerance", tolerance), ("--bits-tolerance", drift["bits_tolerance"])):
        if value is not None and not math.isfinite(value):
            raise UsageError("verify", f"{option} to be a finite number", str(value), "give one, such as 1e-4")
    if text is not None and against is None:
        raise UsageError("verify", "--against with --text", "--text alone", "name the checkpoint to compare with")
    from ..bundle import MANIFEST, read_bundle

    if against is not None and (against / MANIFEST).is_file():
        if polygraphy or config is not None:
            option = "--polygraphy" if polygraphy else "--config"
            raise UsageError("verify", f"no {option} against a bundle", "one", "leave it out")
        run = (device, backend, threads, memory_kernel, engine)
        _drift(bundle, against, run, as_json, text=text, tokens=tokens, tolerance=tolerance, seed=cuts, **drift)
        return
    if given := next((name for name, value in drift.items() if value is not None), None):
        option = "--" + given.replace("_", "-")
        got = "the golden logits" if against is None else f"{against}, which holds no {MANIFEST}"
        raise UsageError("verify", f"--against BUNDLE with {option}", got, "name a bundle to compare with")
    from ..verify import verify_stream

    tokens = tokens or _DEFAULT_TOKENS
    opened = read_bundle(bundle)
    limit = opened.tolerance if tolerance is None else tolerance
    session = open_session(bundle, device, backend, threads, memory_kernel, engine)
    stream, reference = (
        _golden(opened, tokens) if against is None else _pytorch(opened, session, against, config, text, tokens, cuts)
    )
    with progress_bar("verifying", len(stream), "tok") as advance:
        report = verify_stream(session, stream, reference, limit, cuts, advance)
    checks = _check_graphs(opened, limit) if polygraphy else None

    passed = report.passed and all(check.passed for check in checks or [])
    if as_json:
        emit(_as_json(bundle, against, session, report, checks, passed))
    else:
        _print(bundle, against, report, checks)
    if not passed:
        raise _mismatch(bundle, report, checks or [])


def _drift(
    bundle: Path,
    against: Path,
    run: tuple[str, str | None, int, str, str | None],
    as_json: bool,
    *,
    output: Path | None,
    html: Path | None,
    against_device: str | None,
    against_backend: str | None,
    against_engine: str | None,
    against_memory_kernel: str | None,
    layers: int | None,
    recall: int | None,
    **given: Any,
) -> None:
    """Compares with another bundle."""
    for path in (output, html):
        if path is not None and not path.parent.is_dir():
            raise OutputError("output", f"a folder {path.parent}", "none", "create the folder first")
    if html is not None:
        import matplotlib  # noqa: F401  # missing, it is told before the long measurement

    from ..drift.measure import Options, measure

    named = {"layer_tokens": layers, "longest_recall": recall} | given
    options = Options(**{name: value for name, value in named.items() if value is not None})
    device, backend, threads, memory_kernel, engine = run
    if against_engine is None and bundle.resolve() == against.resolve():
        against_engine = engine
    session = open_session(bundle, *run)
    base = open_session(
        against,
        against_device or device,
        against_backend or backend,
        threads,
        against_memory_kernel or memory_kernel,
        against_engine,
    )
    with progress_bar("comparing", options.tokens, "tok") as advance:
        report = measure(bundle, session, against, base, options, advance, note)
    result = report.to_json()
    from ..files import replacing_file

    if output is not None:
        with replacing_file(output) as aside:
            aside.write_text(to_json(result) + "\n", encoding="utf-8")
    if html is not None:
        from ..drift.page import render

        with replacing_file(html) as aside:
            aside.write_text(render(result), encoding="utf-8")
    if as_json:
        emit(result)
    else:
        _print_drift(report)
    if not report.drift.passed:
        raise _drifted(bundle, against, report)


def _print_drift(report: Report) -> None:
    """The verdict, windows, memories, layers and recall."""
    drift = report.drift
    click.echo(report.verdict())
    if drift.windows:
        bits = drift.bits is not None
        header = ("from", *(("bits against", "bits", "larger by", "KL") if bits else ()), "mean error", "max error")
        rows = []
        for window in drift.windows:
            own = (
                (f"{window.base_bits:.4f}", f"{window.bits:.4f}", f"{window.bits_difference or 0:.3%}") if bits else ()
            )
            row = (window.start, *own, *((number(window.kl_mean),) if bits else ()))
            rows.append((*row, number(window.mean_abs_error), number(window.max_abs_error)))
        click.echo("\n" + table(header, rows))
    last = [entry for entry in drift.memory if entry.position == drift.memory[-1].position]
    if last:
        rows = [(entry.layer, number(entry.weights), number(entry.surprise)) for entry in last]
        click.echo("\n" + table(("memory at the end", "distance of W", "of S"), rows))
    if report.layers:
        rows = [(error.layer, error.what, number(error.relative_error)) for error in report.layers]
        click.echo("\n" + table(("layer", "of", "relative error"), rows))
    if report.recall:
        what = "answers right" if report.recall_task == "pairs" else "bits saved"
        rows = [(entry.distance, f"{entry.base:.3f}", f"{entry.value:.3f}") for entry in report.recall]
        click.echo("\n" + table(("recall over", f"{what}, against", what), rows))


def _drifted(bundle: Path, against: Path, report: Report) -> MismatchError:
    drift = report.drift
    wanted = []
    if report.tolerance is not None:
        wanted.append(f"within {number(report.tolerance)}")
    if report.bits_tolerance is not None:
        wanted.append(f"within {report.bits_tolerance:g} % of the bits")
    got = f"{number(drift.max_abs_error)}"
    if drift.bits_difference is not None:
        got += f", bits {drift.bits_difference:+.3%}"
    got += f", the first too large at position {drift.first_bad_position}"
    expected = f"{bundle} to be {' and '.join(wanted)} of {against}"
    return MismatchError("verify", expected, got, "choose a finer recipe, or allow for the difference")


def _golden(bundle: Bundle, count: int) -> tuple[Tokens, Reference]:
    from ..verify import Golden

    tokens, logits = bundle.golden()
    return tokens[:count], Golden(logits)


def _pytorch(
    bundle: Bundle,
    session: titans_runtime.Session,
    source: Path,
    config: str | None,
    text: Path | None,
    count: int,
    seed: int,
) -> tuple[Tokens, Reference]:
    import numpy as np

    from ..checkpoints import LoadOptions, load_checkpoint
    from ..verify import PyTorch

    described = bundle.manifest.model
    options = LoadOptions(config, (described.config or {}).get("bug_compatible_after"))
    checkpoint = load_checkpoint(source, described.checkpoint_format, options)
    signal = checkpoint.model.input
    if (signal.kind, signal.size) != (session.input_kind, session.input_size):
        wanted, got = (
            f"a vocabulary of {size}" if kind == "tokens" else f"vectors of {size}"
            for kind, size in ((session.input_kind, session.input_size), (signal.kind, signal.size))
        )
        raise CheckpointError(
            "verify",
            f"a checkpoint that takes what the bundle does, {wanted}",
            got,
            "give the checkpoint that the bundle was exported from",
        )
    if described.weights_sha256 not in (None, checkpoint.weights_sha256):
        note(f"{bundle.path} was exported from other weights than {source}")
    rng = np.random.default_rng(seed)
    if signal.kind == "vectors":
        if text is not None:
            raise UsageError("verify", "no --text with a bundle that takes vectors", str(text), "leave it out")
        tokens = rng.standard_normal((count, signal.size), np.float32)
    elif text is None:
        tokens = rng.integers(0, session.vocab_size, count, np.int32)
    else:
        tokens = _read_tokens(text, bundle, count)
    return tokens, PyTorch(checkpoint.model)


def _read_tokens(text: Path, bundle: Bundle, count: int) -> Tokens:
    """The first `count` tokens of the text."""
    import numpy as np

    from ..tokenizer import TextError, open_tokenizer

    blocks, have = [], 0
    with text.open("rb") as file:
        for block, _ in open_tokenizer(bundle.manifest.tokenizer, bundle.path).read(file):
            blocks.append(block)
            have += len(block)
            if have >= count:
                break
    if not blocks:
        raise TextError("verify", f"text in {text}", "an empty file", "give a longer text")
    return np.concatenate(blocks)[:count]


def _check_graphs(bundle: Bundle, tolerance: float) -> list[OutputCheck]:
    from ..graph_check import check_graphs

    note("running every graph in ONNX Runtime and in ONNX's NumPy reference")
    return check_graphs(bundle, tolerance)


def _as_json(
    bundle: Path,
    against: Path | None,
    session: titans_runtime.Session,
    report: VerifyReport,
    checks: list[OutputCheck] | None,
    passed: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "bundle": str(bundle),
        "against": "golden" if against is None else str(against),
        "memory_kernel": session.info["memory_kernel"],
        "passed": passed,
        "max_abs_error": report.max_abs_error,
        "first_bad_position": report.first_bad_position,
        "positions": report.positions,
        "tolerance": report.tolerance,
        "pytorch_float32_to_float64": report.pytorch_float32_to_float64,
        "feeds": {name: dataclasses.asdict(distance) for name, distance in report.feeds.items()},
    }
    if checks is not None:
        result["polygraphy"] = [{**dataclasses.asdict(check), "passed": check.passed} for check in checks]
    return result


def _print(bundle: Path, against: Path | None, report: VerifyReport, checks: list[OutputCheck] | None) -> None:
    reference = "golden logits" if against is None else f"{against} in PyTorch float32"
    click.echo(f"{bundle} against {reference}, {report.positions} tokens, tolerance {number(report.tolerance)}\n")
    rows = [
        (name.replace("_", " "), number(d.max_abs_error), "-" if d.first_bad_position is None else d.first_bad_position)
        for name, d in report.feeds.items()
    ]
    click.echo(table(("fed", "max error", "first bad position"), rows))
    if report.pytorch_float32_to_float64 is not None:
        click.echo(f"\nPyTorch float32 to float64: {number(report.pytorch_float32_to_float64)}")
    if checks is not None:
        click.echo("\n" + table(("graph", "output", "max error", "passed"), [_row(check) for check in checks]))


def _row(check: OutputCheck) -> tuple[object, ...]:
    return check.graph, check.output, number(check.max_abs_error), "yes" if check.passed else "NO"


def _mismatch(bundle: Path, report: VerifyReport, checks: list[OutputCheck]) -> MismatchError:
    remedy = "export the bundle again, or allow for the difference with --tolerance"
    if report.passed:
        bad = next(check for check in checks if not check.passed)
        got = f"{number(bad.max_abs_error)} in output {bad.output} of graph {bad.graph}"
    else:
        got = f"{number(report.max_abs_error)}, the first too large at position {report.first_bad_position}"
    return MismatchError("verify", f"{bundle} to be within {number(report.tolerance)}", got, remedy)
