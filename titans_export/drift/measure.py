"""The comparison of two bundles: streams, layers and recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bundle import Bundle, read_bundle
from ..errors import BundleError, MachineError, UsageError
from . import recall
from .report import Report, Side
from .streams import WINDOW, Inputs, check_alike, compare

if TYPE_CHECKING:
    import titans_runtime

RANDOM_LENGTH = 100_000  # default number of inputs without a text
LAYER_TOKENS = 4096
LONGEST_RECALL = 1024
_EPISODE_FILLER = 64  # of the recall task's episodes, as a stream


@dataclass(frozen=True)
class Options:
    """Options of a comparison. `bits_tolerance` is in percent; a tolerance of None is no limit. 0 skips layers or
    recall. `recall_task` None chooses by the model.
    """

    text: Path | None = None
    tokens: int | None = None
    seed: int = 0
    window: int = WINDOW
    stream_length: int | None = None
    tolerance: float | None = None
    bits_tolerance: float | None = None
    layer_tokens: int = LAYER_TOKENS
    longest_recall: int = LONGEST_RECALL
    recall_task: str | None = None
    encoding_errors: str = "strict"


@dataclass(frozen=True)
class Input:
    """The input: a description, the values, and for a text the bytes per token."""

    what: str
    values: Inputs
    bytes_per_token: float | None = None


def measure(
    path: Path,
    session: titans_runtime.Session,
    reference_path: Path,
    reference_session: titans_runtime.Session,
    options: Options,
    progress: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Drift of the bundle in its session from the reference. Raises TitansError."""
    side, reference = Side(read_bundle(path), session), Side(read_bundle(reference_path), reference_session)
    check_alike(reference_session, session, path.name)
    _check_tokenizers(side.bundle, reference.bundle)
    task = options.recall_task or recall.task_of(session.vocab_size, session.info["tokenizer"])
    given = read_input(reference, options, task)
    found = compare(
        reference_session,
        {path.name: session},
        given.values,
        window=options.window,
        tolerance=options.tolerance,
        bits_tolerance=options.bits_tolerance,
        stream_length=options.stream_length,
        progress=progress,
    )
    report = Report(
        side,
        reference,
        given.what,
        given.bytes_per_token,
        options.window,
        options.stream_length,
        options.tolerance,
        options.bits_tolerance,
        found.drifts[path.name],
        found.reference_seconds,
    )
    return _inside(report, given, task, options, say)


def _inside(report: Report, given: Input, task: str, options: Options, say: Callable[[str], None]) -> Report:
    """The report with layers and recall."""
    from dataclasses import replace

    side, reference = report.side, report.reference
    count = min(options.layer_tokens, options.stream_length or options.layer_tokens, len(given.values))
    kernels = [one.session.info["memory_kernel"] for one in (side, reference)]
    if not count:
        report = replace(report, layers_missing="skipped")
    elif any(one.session.info["engine"] or one.session.info["device"] != "cpu" for one in (side, reference)):
        report = replace(report, layers_missing="only plain graphs on the CPU are compared by layer")
    elif side.bundle.manifest == reference.bundle.manifest and kernels[0] != kernels[1]:
        report = replace(report, layers_missing="the graphs are the same, and layers are compared with one kernel only")
    else:
        from .layers import measure_layers

        say(f"comparing the layers over {count:,} tokens")
        try:
            errors = measure_layers(reference.bundle.path, {"": side.bundle.path}, given.values[:count])[""]
            report = replace(report, layers=errors, layer_tokens=count)
        except MachineError as error:
            report = replace(report, layers_missing=str(error))
    if options.longest_recall and report.takes_tokens and len(given.values):
        say(f"measuring recall over up to {options.longest_recall:,} tokens")
        measured = recall.measure_recall(
            reference.session, {"": side.session}, task, options.longest_recall, given.values, seed=options.seed
        )
        report = replace(report, recall_task=task, recall=measured[""])
    return report


def read_input(reference: Side, options: Options, task: str) -> Input:
    """The text's tokens. Without a text: random tokens, or episodes for a model of the recall task."""
    session, count = reference.session, options.tokens or RANDOM_LENGTH
    random = np.random.default_rng(options.seed)
    if session.input_kind == "vectors":
        if options.text is not None:
            raise UsageError("E0106", "compare", f"{reference.bundle.path} takes vectors, not text", "leave out --text")
        values = random.standard_normal((count, session.input_size), np.float32)
        return Input(f"random vectors, seed {options.seed}", values)
    if options.text is not None:
        return read_text(reference.bundle, options.text, options.tokens, options.encoding_errors)
    if task == "pairs":
        tokens = recall.episodes(count, _EPISODE_FILLER, options.seed)
        return Input(f"episodes of the recall task, seed {options.seed}", tokens)
    return Input(f"random tokens, seed {options.seed}", random.integers(0, session.vocab_size, count, np.int32))


def read_text(bundle: Bundle, text: Path, most: int | None, encoding_errors: str = "strict") -> Input:
    """The first `most` tokens of the text, or all."""
    from ..tokenizer import open_tokenizer, read_tokens

    tokenizer = open_tokenizer(
        bundle.manifest.tokenizer, bundle.path, bundle.manifest.input.vocab_size, encoding_errors
    )
    tokens, covered = read_tokens(text, tokenizer, most)
    return Input(text.name, tokens, covered / len(tokens))


def _check_tokenizers(one: Bundle, other: Bundle) -> None:
    """Raises BundleError if the tokenizers of the two differ."""
    hashes = [
        bundle.manifest.files[file].xxh3_128 if (file := bundle.manifest.tokenizer.file) else None
        for bundle in (one, other)
    ]
    if hashes[0] != hashes[1]:
        problem = f"{one.path.name} has another tokenizer than {other.path.name}"
        raise BundleError("E0905", "drift", problem, "compare bundles of one model")
