"""One stream that is right and others, all fed the same tokens in the same cuts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, UsageError
from .memory import Fields, distances
from .metrics import Drift, Floats, Meter, Right, uniform

if TYPE_CHECKING:
    import titans_runtime

Inputs = NDArray[Any]  # (T,) int32 tokens, or (T, size) float32 vectors
WINDOW = 32_768
# What the outputs of one feed may take, of each stream.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: the drift of each stream by name, and the seconds that the right one took."""

    drifts: dict[str, Drift] = field(default_factory=dict)
    base_seconds: float = 0.0


def compare(
    base: titans_runtime.Session,
    others: Mapping[str, titans_runtime.Session],
    inputs: Inputs,
    *,
    window: int = WINDOW,
    tolerance: float | None = None,
    bits_tolerance: float | None = None,
    stream_length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Drift of every other session's stream from the base's, in one pass: the base runs once, however many there are.

    `tolerance` is the largest absolute difference of an output, `bits_tolerance` by how many percent a window's bits
    may be larger; None: anything. `stream_length`: fresh streams after so many tokens. The memories are looked at where
    a window ends, at the first cut from there on. Raises BundleError where sessions do not take and give the same.
    """
    for name, session in others.items():
        check_alike(base, session, name)
    logits = base.input_kind == "tokens"
    if logits and len(inputs) and not 0 <= int(inputs.min()) <= int(inputs.max()) < base.vocab_size:
        raise UsageError("drift", f"tokens below {base.vocab_size}", f"{inputs.min()} to {inputs.max()}", "check them")
    part = None if bits_tolerance is None else bits_tolerance / 100
    meters = {name: Meter(logits, base.output_size, window, tolerance, part) for name in others}
    base_seconds, before, position, looked = 0.0, uniform(base.output_size), 0, 0
    with ExitStack() as stack:
        right = stack.enter_context(closing(base.stream()))
        streams = {name: stack.enter_context(closing(session.stream())) for name, session in others.items()}
        for block, fresh in _blocks(inputs, block_length(base, window), stream_length):
            if fresh:
                before = uniform(base.output_size)
                for stream, meter in zip((right, *streams.values()), (None, *meters.values()), strict=True):
                    stream.reset()
                    if meter is not None:
                        meter.restart()
            outputs, seconds = _feed(right, block)
            base_seconds += seconds
            rows, base_bits = Right(outputs, logits), None
            if logits:
                base_bits, before = rows.bits(block, before)
            for name, stream in streams.items():
                outputs, seconds = _feed(stream, block)
                meters[name].drift.seconds += seconds
                meters[name].add(outputs, rows, block, base_bits)
            position += len(block)
            if position // window > looked // window or position == len(inputs):
                looked = position
                memory = right.memory()
                for name, stream in streams.items():
                    meters[name].drift.memory += distances(position, _memory(stream, memory, name), memory)
            progress(len(block))
    for meter in meters.values():
        meter.close()
    return Comparison({name: meter.drift for name, meter in meters.items()}, base_seconds)


def block_length(session: titans_runtime.Session, window: int) -> int:
    """Tokens of a feed: whole calls of the largest graph, so that it makes no difference how many, up to a window."""
    largest = max(int(graph["tokens"]) for graph in session.info["graphs"])
    return largest * max(1, min(_BLOCK_BYTES // (largest * session.output_size * 4), -(-window // largest)))


def check_alike(base: titans_runtime.Session, other: titans_runtime.Session, name: str) -> None:
    """Raises BundleError unless the two take and give the same."""
    for what, right, got in (
        ("input", _signal(base, base.input_size), _signal(other, other.input_size)),
        ("output", f"{base.output_size} numbers", f"{other.output_size} numbers"),
        ("tokenizer", base.info["tokenizer"], other.info["tokenizer"]),
    ):
        if right != got:
            remedy = "compare bundles of one model"
            raise BundleError("drift", f"the {what} of {name} to be that of what it is compared with, {right}",
                              str(got), remedy)  # fmt: skip


def _signal(session: titans_runtime.Session, size: int) -> str:
    return f"a vocabulary of {size}" if session.input_kind == "tokens" else f"vectors of {size}"


def _blocks(inputs: Inputs, size: int, stream_length: int | None) -> Iterator[tuple[Inputs, bool]]:
    """Blocks in order, each with whether a fresh stream begins with it."""
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


def _memory(stream: titans_runtime.Stream, right: Fields, name: str) -> Fields:
    """The stream's memories. Raises BundleError where they are not of the shapes of the right ones."""
    got = stream.memory()
    for field_name, values in right.items():
        shape = got[field_name].shape if field_name in got else None
        if field_name.rpartition(".")[2][0] in "WSg" and shape != values.shape:
            raise BundleError("drift", f"{field_name} of {name} of shape {values.shape}",
                              f"{shape}", "compare bundles of one model")  # fmt: skip
    return got


__all__ = ["WINDOW", "Comparison", "Floats", "Inputs", "block_length", "check_alike", "compare"]
