"""`titans-export verify`: does a bundle compute what PyTorch computes?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckpointError, MismatchError, UsageError
from .command import Command, emit, json_option, note
from .options import PATH, bundle_argument, config_option, engine_option, open_session, session_options
from .progress import progress_bar
from .table import number, table

if TYPE_CHECKING:
    import titans_runtime

    from ..bundle import Bundle
    from ..graph_check import OutputCheck
    from ..verify import Reference, Tokens, VerifyReport


@click.command(
    cls=Command,
    examples=(
        "titans-export verify mac.titans",
        "titans-export verify mac.titans --against checkpoints/mac --text book.txt --tokens 50000",
        "titans-export verify mac.titans --polygraphy --json",
    ),
)
@bundle_argument
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="Compare with this checkpoint in PyTorch, float32.")
@config_option
@click.option("--text", type=PATH, help="Text to compare over, with --against.  [default: random tokens]")
@click.option("--tokens", type=click.IntRange(1), default=10_000, help="Tokens to compare over at most.")
@click.option(
    "--tolerance", type=click.FloatRange(0), help="Largest absolute difference of a logit.  [default: the bundle's own]"
)
@click.option("--cuts", type=click.IntRange(0), default=0, metavar="SEED", help="Seed of random cuts and tokens.")
@click.option("--polygraphy", is_flag=True, help="Also compare each graph's ONNX Runtime with ONNX's NumPy reference.")
@engine_option
@session_options
@json_option
def verify(
    bundle: Path,
    against: Path | None,
    config: str | None,
    text: Path | None,
    tokens: int,
    tolerance: float | None,
    cuts: int,
    polygraphy: bool,
    engine: str | None,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    as_json: bool,
) -> None:
    """Check that a bundle computes what PyTorch computes.

    The runtime reads a stream whole, token by token and in random cuts, and every logit is compared: with the golden
    logits in BUNDLE or, with --against, with the checkpoint in PyTorch. Exit code 3 if one is too far off.
    """
    if tolerance is not None and not math.isfinite(tolerance):
        raise UsageError("verify", "--tolerance to be a finite number", str(tolerance), "give one, such as 1e-4")
    if text is not None and against is None:
        raise UsageError("verify", "--against with --text", "--text alone", "name the checkpoint to compare with")
    from ..bundle import read_bundle
    from ..verify import verify_stream

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

    model_entry = bundle.manifest["model"]
    options = LoadOptions(config, model_entry.get("config", {}).get("bug_compatible_after"))
    checkpoint = load_checkpoint(source, model_entry["source"].get("format", "titans"), options)
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
    if bundle.manifest["model"]["source"].get("weights_sha256") not in (None, checkpoint.weights_sha256):
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
        for block, _ in open_tokenizer(bundle.manifest["tokenizer"], bundle.path).read(file):
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
