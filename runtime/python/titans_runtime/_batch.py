"""One call for many streams, side by side (docs/streams.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ._library import INVALID_ARGUMENT, LOGITS, Error, Feed, FloatPointer, TokenPointer, lib
from ._progress import cancelling
from ._stream import Floats, Stream, StreamFormat, Tokens, Vectors, token_array, vector_array


class BatchError(Error):
    """Streams of a batch failed; the others have gone on. Where the batch itself is refused, all have failed.

    ``statuses`` has the status of each stream, 0 where it succeeded, and ``logits`` what the call would have returned,
    zeros where a stream failed.
    """

    def __init__(self, message: str, status: int, statuses: list[int], logits: Floats | list[Floats] | None) -> None:
        super().__init__(message, status)
        self.statuses = statuses
        self.logits = logits


def feed_batch(
    session: ctypes.c_void_p,
    form: StreamFormat,
    streams: Sequence[Stream],
    sequences: Sequence[Tokens | Vectors],
    logits: Literal["all", "last", "none"],
) -> Floats | list[Floats] | None:
    if logits not in LOGITS:
        raise _wrong("logits to be 'all', 'last' or 'none'", repr(logits), "pass one of these")
    if len(streams) != len(sequences):
        raise _wrong(f"{len(streams)} sequences, one for each stream", str(len(sequences)), "pass as many as streams")
    vectors = form.kind == "vectors"
    given: list[Any] = [
        vector_array(sequence, form.input_size) if vectors else token_array(sequence) for sequence in sequences
    ]
    size = form.output_size
    one_for_all = np.zeros((len(given), size), np.float32)
    rows: list[Floats] = list(one_for_all)
    if logits == "all":
        rows = [np.zeros((len(sequence), size), np.float32) for sequence in given]
    room = 0 if logits == "none" else 1
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
        item.which = LOGITS[logits]
        item.logits = out.ctypes.data_as(FloatPointer)
        item.capacity = out.size * room
    statuses = (ctypes.c_int * len(given))()

    def run() -> tuple[int, str]:
        status = lib.titans_session_feed_batch(session, items, len(given), statuses)
        return status, lib.titans_last_error().decode("utf-8", "replace")

    # A thread takes longer than a token.
    long = any(len(sequence) > 1 for sequence in given)
    status, message = cancelling(run, handles) if long else run()
    result = None if logits == "none" else one_for_all if logits == "last" else rows
    if status:
        for out, own in zip(rows, statuses, strict=True):
            if own:
                out[:] = 0
        raise BatchError(message, status, list(statuses), result)
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
        raise _wrong(f"{len(streams)} tokens, one for each stream", str(len(ids)), "pass as many as streams")
    handles = (ctypes.c_void_p * len(streams))(*(stream._open() for stream in streams))
    logits = np.zeros((len(streams), form.output_size), np.float32)
    statuses = (ctypes.c_int * len(streams))()
    status = lib.titans_session_step_batch(
        session,
        handles,
        ids.ctypes.data_as(TokenPointer),
        len(ids),
        logits.ctypes.data_as(FloatPointer),
        statuses,
    )
    if status:
        raise BatchError(lib.titans_last_error().decode("utf-8", "replace"), status, list(statuses), logits)
    return logits


def _wrong(expected: str, got: str, advice: str) -> Error:
    return Error(f"[batch] expected {expected} but got {got}; do {advice}", INVALID_ARGUMENT)
