"""A reference stream and candidates, all fed the same tokens in the same cuts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, UsageError
from ..row_fields import STORED_KINDS
from .memory import Fields, Kinds, distances, kinds_of
from .metrics import Drift, Floats, Meter, ReferenceOutputs, uniform

if TYPE_CHECKING:
    import titans_runtime

Inputs = NDArray[Any]  # (T,) int32 tokens, or (T, size) float32 vectors
WINDOW = 32_768
# Maximum size of the outputs of one feed of a stream.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Comparison:
    """The drift of each candidate by name, and the seconds that the reference took."""

    drifts: dict[str, Drift] = field(default_factory=dict)
    reference_seconds: float = 0.0


def compare(
    reference: titans_runtime.Session,
    candidates: Mapping[str, titans_runtime.Session],
    inputs: Inputs,
    *,
    window: int = WINDOW,
    tolerance: float | None = None,
    bits_tolerance: float | None = None,
    stream_length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Drift of the streams of all candidates from the reference's, in one pass: the reference runs once.

    `inputs`: (T,) int32 tokens or (T, size) float32 vectors. `tolerance`: maximum absolute difference of an output;
    `bits_tolerance`: maximum increase of a window's bits, in percent; None: no limit. `stream_length`: tokens per
    stream. Memories are compared at the first cut after the end of a window. Raises BundleError for sessions with
    different inputs, outputs or tokenizers, UsageError for tokens outside the vocabulary.
    """
    for name, session in candidates.items():
        check_alike(reference, session, name)
    logits = reference.input_kind == "tokens"
    if logits and len(inputs) and not 0 <= int(inputs.min()) <= int(inputs.max()) < reference.vocab_size:
        raise UsageError(
            "E0109",
            "drift",
            f"token out of range: expected 0 to {reference.vocab_size - 1}, got {inputs.min()} to {inputs.max()}",
            "give tokens of the model's vocabulary",
        )
    part = None if bits_tolerance is None else bits_tolerance / 100
    meters = {name: Meter(logits, reference.output_size, window, tolerance, part) for name in candidates}
    kinds = kinds_of(reference.info)
    reference_seconds, before, position, looked = 0.0, uniform(reference.output_size), 0, 0
    with ExitStack() as stack:
        reference_stream = stack.enter_context(closing(reference.stream()))
        streams = {name: stack.enter_context(closing(session.stream())) for name, session in candidates.items()}
        for block, fresh in _blocks(inputs, block_length(reference, window), stream_length):
            if fresh:
                before = uniform(reference.output_size)
                for stream, meter in zip((reference_stream, *streams.values()), (None, *meters.values()), strict=True):
                    stream.reset()
                    if meter is not None:
                        meter.restart()
            outputs, seconds = _feed(reference_stream, block)
            reference_seconds += seconds
            rows, reference_bits = ReferenceOutputs(outputs, logits), None
            if logits:
                reference_bits, before = rows.bits(block, before)
            for name, stream in streams.items():
                outputs, seconds = _feed(stream, block)
                meters[name].drift.seconds += seconds
                meters[name].add(outputs, rows, block, reference_bits)
            position += len(block)
            if position // window > looked // window or position == len(inputs):
                looked = position
                memory = reference_stream.memory()
                for name, stream in streams.items():
                    meters[name].drift.memory += distances(
                        position, _memory(stream, memory, kinds, name), memory, kinds
                    )
            progress(len(block))
    for meter in meters.values():
        meter.close()
    return Comparison({name: meter.drift for name, meter in meters.items()}, reference_seconds)


def block_length(session: titans_runtime.Session, window: int) -> int:
    """Tokens of a feed: whole calls of the largest graph, at most about a window, so that cuts change nothing."""
    largest = max(int(graph["tokens"]) for graph in session.info["graphs"])
    return largest * max(1, min(_BLOCK_BYTES // (largest * session.output_size * 4), -(-window // largest)))


def check_alike(reference: titans_runtime.Session, candidate: titans_runtime.Session, name: str) -> None:
    """Raises BundleError if inputs, outputs or tokenizers of the two differ."""
    for what, wanted, got in (
        ("input", _signal(reference, reference.input_size), _signal(candidate, candidate.input_size)),
        ("output", f"{reference.output_size} numbers", f"{candidate.output_size} numbers"),
        ("tokenizer", reference.info["tokenizer"], candidate.info["tokenizer"]),
    ):
        if wanted != got:
            problem = f"{name} has another {what} than the reference: expected {wanted}, got {got}"
            raise BundleError("E0905", "drift", problem, "compare bundles of one model")


def _signal(session: titans_runtime.Session, size: int) -> str:
    return f"a vocabulary of {size}" if session.input_kind == "tokens" else f"vectors of {size}"


def _blocks(inputs: Inputs, size: int, stream_length: int | None) -> Iterator[tuple[Inputs, bool]]:
    """Blocks in order, each with True if a fresh stream begins with it."""
    length = stream_length or max(1, len(inputs))
    for first in range(0, len(inputs), length):
        stream = inputs[first : first + length]
        for start in range(0, len(stream), size):
            yield stream[start : start + size], first > 0 and start == 0


def _feed(stream: titans_runtime.Stream, block: Inputs) -> tuple[NDArray[np.float32], float]:
    """The outputs after each of the block's inputs, and the seconds."""
    began = time.perf_counter()
    outputs = stream.feed(block)
    assert outputs is not None
    return outputs, time.perf_counter() - began


def _memory(stream: titans_runtime.Stream, reference: Fields, kinds: Kinds, name: str) -> Fields:
    """The stream's memories. Raises BundleError if a shape differs from the reference."""
    got = stream.memory()
    for field_name, values in reference.items():
        shape = got[field_name].shape if field_name in got else None
        if kinds.get(field_name) in STORED_KINDS and shape != values.shape:
            problem = f"{field_name} of {name} has another shape: expected {values.shape}, got {shape}"
            raise BundleError("E0905", "drift", problem, "compare bundles of one model")
    return got


__all__ = ["WINDOW", "Comparison", "Floats", "Inputs", "block_length", "check_alike", "compare"]
