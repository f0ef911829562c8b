"""Batches: many streams in one call (docs/streams.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ._library import OUTPUTS, Error, Feed, FloatPointer, TokenPointer, invalid, last_error, lib
from ._progress import cancelling
from ._stream import Floats, Stream, StreamFormat, Tokens, Vectors, token_array, vector_array


class BatchError(Error):
    """Streams of a batch failed; the others have continued. If the batch was refused, all have failed.

    ``statuses`` has the status of each stream, 0 for success. ``outputs`` is the result of the call, with zeros for
    failed streams.
    """

    def __init__(
        self, message: str, status: int, code: str, statuses: list[int], outputs: Floats | list[Floats] | None
    ) -> None:
        super().__init__(message, status, code)
        self.statuses = statuses
        self.outputs = outputs


def feed_batch(
    session: ctypes.c_void_p,
    form: StreamFormat,
    streams: Sequence[Stream],
    sequences: Sequence[Tokens | Vectors],
    outputs: Literal["all", "last", "none"],
) -> Floats | list[Floats] | None:
    if outputs not in OUTPUTS:
        raise invalid("E0501", "batch", f"unknown outputs: {outputs!r}", "pass 'all', 'last' or 'none'")
    if len(streams) != len(sequences):
        problem = f"expected {len(streams)} sequences, one per stream, got {len(sequences)}"
        raise invalid("E0514", "batch", problem, "pass one sequence per stream")
    vectors = form.kind == "vectors"
    given: list[Any] = [
        vector_array(sequence, form.input_size) if vectors else token_array(sequence) for sequence in sequences
    ]
    size = form.output_size
    one_for_all = np.zeros((len(given), size), np.float32)
    rows: list[Floats] = list(one_for_all)
    if outputs == "all":
        rows = [np.zeros((len(sequence), size), np.float32) for sequence in given]
    room = 0 if outputs == "none" else 1
    calls = [stream._calls.begin() for stream in streams]
    handles = [stream._open() for stream in streams]
    items = (Feed * len(given))()
    for item, handle, sequence, out in zip(items, handles, given, rows, strict=True):
        item.struct_size = ctypes.sizeof(Feed)
        item.stream = handle
        if vectors:
            item.vectors = sequence.ctypes.data_as(FloatPointer)
        else:
            item.tokens = sequence.ctypes.data_as(TokenPointer)
        item.count = len(sequence)
        item.which = OUTPUTS[outputs]
        item.outputs = out.ctypes.data_as(FloatPointer)
        item.capacity = out.size * room
    statuses = (ctypes.c_int * len(given))()

    def run() -> tuple[int, tuple[str, str]]:
        status = lib.titans_session_feed_batch(session, items, len(given), statuses)
        return status, last_error()

    # Starting a thread takes longer than a token.
    long = any(len(sequence) > 1 for sequence in given)
    try:
        status, (message, code) = cancelling(run, handles) if long else run()
    finally:
        del calls
    result = None if outputs == "none" else one_for_all if outputs == "last" else rows
    if status:
        for out, own in zip(rows, statuses, strict=True):
            if own:
                out[:] = 0
        raise BatchError(message, status, code, list(statuses), result)
    return result


def step_batch(
    session: ctypes.c_void_p, form: StreamFormat, streams: Sequence[Stream], tokens: Tokens | Vectors
) -> Floats:
    if form.kind == "vectors":
        rows = vector_array(tokens, form.input_size)
        result = feed_batch(session, form, streams, [row[None] for row in rows], "last")
        assert isinstance(result, np.ndarray)
        return result
    ids = token_array(tokens)
    if len(streams) != len(ids):
        problem = f"expected {len(streams)} tokens, one per stream, got {len(ids)}"
        raise invalid("E0514", "batch", problem, "pass one token per stream")
    calls = [stream._calls.begin() for stream in streams]
    handles = (ctypes.c_void_p * len(streams))(*(stream._open() for stream in streams))
    outputs = np.zeros((len(streams), form.output_size), np.float32)
    statuses = (ctypes.c_int * len(streams))()
    try:
        status = lib.titans_session_step_batch(
            session,
            handles,
            ids.ctypes.data_as(TokenPointer),
            len(ids),
            outputs.ctypes.data_as(FloatPointer),
            statuses,
        )
    finally:
        del calls
    if status:
        message, code = last_error()
        raise BatchError(message, status, code, list(statuses), outputs)
    return outputs
