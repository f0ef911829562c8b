"""One sequence and what its memory has learned."""

from __future__ import annotations

import ctypes
import math
import operator
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ._guard import GuardReport, guard_report, set_guard
from ._library import INVALID_ARGUMENT, LOGITS, Error, FloatPointer, MemoryInfo, Sampling, TokenPointer, check, lib
from ._progress import Progress, Watched, Watcher
from ._state import Key, encode_path, state_options

Tokens: TypeAlias = "bytes | bytearray | Sequence[int] | npt.NDArray[np.integer[Any]]"
Vectors: TypeAlias = "npt.NDArray[np.floating[Any]] | Sequence[Any]"
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StreamFormat:
    """What streams of a bundle consume and give: "tokens" or "vectors", and the sizes of a row."""

    kind: str
    input_size: int
    output_size: int


class Stream:
    """Made by :meth:`Session.stream`. A call that fails leaves the stream as it was."""

    def __init__(self, handle: ctypes.c_void_p, form: StreamFormat) -> None:
        self._handle = handle
        self._form = form
        self._watcher = Watcher()
        self._generations: weakref.WeakSet[_Generation] = weakref.WeakSet()

    def feed(
        self,
        tokens: Tokens | Vectors,
        logits: Literal["all", "last", "none"] = "all",
        *,
        progress: Progress | None = None,
    ) -> Floats | None:
        """Consumes the tokens. Returns logits after each of them, (T, vocab), or after the last, (vocab,), or None.

        A bundle that takes vectors is fed floats, (T, size) or (T, views, size / views) with views side by side, and
        gives vectors in the logits' stead. ``progress(done, total)`` is called after each call of a graph; what it
        raises ends the feed, as :meth:`cancel` and Ctrl-C do, and the stream is as it was before.
        """
        if logits not in LOGITS:
            raise _wrong("logits to be 'all', 'last' or 'none'", repr(logits), "pass one of these")
        size = self._form.output_size
        if self._form.kind == "vectors":
            rows: npt.NDArray[Any] = vector_array(tokens, self._form.input_size)
            call, given = lib.titans_stream_feed_vectors, _floats(rows)
        else:
            rows = token_array(tokens)
            call, given = lib.titans_stream_feed, _tokens(rows)
        shape = {"all": (len(rows), size), "last": (size,), "none": (0,)}[logits]
        out = np.empty(shape, np.float32)
        with Watched(self._open(), self._watcher, progress):
            check(call(self._open(), given, len(rows), LOGITS[logits], _floats(out), out.size))
        return None if logits == "none" else out

    def step(self, token: int | Vectors) -> Floats:
        """Consumes one token and returns the logits after it, (vocab,).

        Of a bundle that takes vectors: one vector, (size,), and the vector after it.
        """
        out = np.empty(self._form.output_size, np.float32)
        if self._form.kind == "vectors":
            row = vector_array([token], self._form.input_size)
            last = LOGITS["last"]
            check(lib.titans_stream_feed_vectors(self._open(), _floats(row), 1, last, _floats(out), out.size))
        else:
            given = ctypes.byref(ctypes.c_float.from_buffer(out.data))  # faster than _floats
            check(lib.titans_stream_step(self._open(), _token(token), given))
        return out

    def score(self, tokens: Tokens, *, progress: Progress | None = None) -> Floats:
        """Consumes the tokens and returns ln p of each given all before it, (T,).

        On a stream that has consumed nothing the first token is scored as uniform, -ln(vocab). ``progress`` is as in
        :meth:`feed`.
        """
        self._require_tokens()
        ids = token_array(tokens)
        out = np.empty(ids.size, np.float32)
        with Watched(self._open(), self._watcher, progress):
            check(lib.titans_stream_score(self._open(), _tokens(ids), ids.size, _floats(out)))
        return out

    def generate(
        self,
        max_tokens: int | None = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[int | bytes | Sequence[int]] = (),
    ) -> Iterator[int]:
        """Continues the stream, which must have consumed a token. Yields each token after the stream has consumed it.

        temperature 0 takes the most likely token. The filters apply in the order top_k, top_p, min_p. ``max_tokens``
        None means no limit. ``stop`` lists what ends the generation: a token id ends it before that token is consumed,
        and it is not yielded; a sequence (bytes or token ids) ends it once all of it has been generated, and its tokens
        have been consumed and yielded. A sequence counts within what is generated here, not across the prompt.
        """
        self._require_tokens()
        if isinstance(stop, (bytes, str)):
            raise _wrong("stop to be a list of what ends the generation", repr(stop), "write [stop]")
        if any(isinstance(entry, bool) for entry in stop):
            raise _wrong("stop of token ids and sequences", "a bool", "pass token ids")
        singles = [entry for entry in stop if isinstance(entry, (int, np.integer))]
        sequences = [token_array(entry).tolist() for entry in stop if not isinstance(entry, (int, np.integer))]
        if [] in sequences:
            raise _wrong("stop sequences of at least one token", "an empty one", "leave it out")
        ids = token_array(singles)
        sampling = Sampling()
        lib.titans_sampling_init(ctypes.byref(sampling))
        sampling.temperature, sampling.top_p, sampling.min_p = temperature, top_p, min_p
        sampling.top_k = whole_number(top_k, "top_k", 0, 2**31)
        sampling.seed = whole_number(seed, "seed", 0, 2**64)
        sampling.max_tokens = -1 if max_tokens is None else whole_number(max_tokens, "max_tokens", 0, 2**63)
        sampling.stop_tokens, sampling.stop_count = _tokens(ids), ids.size
        handle = ctypes.c_void_p()
        check(lib.titans_generator_create(self._open(), ctypes.byref(sampling), ctypes.byref(handle)))
        generation = _Generation(self, handle, sequences)
        self._generations.add(generation)
        return generation

    def reset(self) -> None:
        """Back to a fresh memory at position 0. Whether the stream learns is kept; marks are not."""
        check(lib.titans_stream_reset(self._open()))

    def fork(self) -> Stream:
        """A second stream with the same state, independent from here on."""
        handle = ctypes.c_void_p()
        check(lib.titans_stream_fork(self._open(), ctypes.byref(handle)))
        return Stream(handle, self._form)

    def save(self, path: str | os.PathLike[str], key: Key | None = None) -> None:
        """Writes the stream to a file, NAME.tstate, for :meth:`Session.restore`. docs/state.md has the format.

        An old file is there, whole, until the new one is. ``key``, 32 bytes, encrypts it with AES-256-GCM.
        """
        options = state_options(key)
        check(lib.titans_stream_save(self._open(), encode_path(path), ctypes.byref(options)))

    def mark(self) -> int:
        """Keeps a copy of the state to go back to, and returns the position, which names it."""
        position = ctypes.c_uint64()
        check(lib.titans_stream_mark(self._open(), ctypes.byref(position)))
        return position.value

    def rewind(self, position: int) -> None:
        """Back to the mark at that position, bit by bit, learning included. The mark stays, later ones go."""
        check(lib.titans_stream_rewind(self._open(), whole_number(position, "position", 0, 2**64)))

    def unmark(self, position: int) -> None:
        """Gives the memory of that mark back."""
        check(lib.titans_stream_unmark(self._open(), whole_number(position, "position", 0, 2**64)))

    @property
    def marks(self) -> list[int]:
        """The positions of all marks, ascending."""
        count = ctypes.c_size_t()
        check(lib.titans_stream_marks(self._open(), None, 0, ctypes.byref(count)))
        positions = (ctypes.c_uint64 * count.value)()
        check(lib.titans_stream_marks(self._handle, positions, count.value, ctypes.byref(count)))
        return list(positions)

    def freeze(self) -> None:
        """From the next token on the memory stays as it is."""
        check(lib.titans_stream_set_learning(self._open(), 0))

    def resume(self) -> None:
        """From the next token on the memory learns again."""
        check(lib.titans_stream_set_learning(self._open(), 1))

    def guard(
        self,
        policy: Literal["off", "raise", "freeze", "skip"] = "raise",
        max_update_norm: float = math.inf,
        max_surprise: float = math.inf,
    ) -> None:
        """From the next call on, looks at each chunk that the memory is about to keep. docs/guard.md says more.

        A chunk is wrong where W, S or the output is not finite, ||W' - W|| / ||W|| of a layer and head is above
        ``max_update_norm``, or ||S|| above ``max_surprise``. Then "raise" fails the call and leaves the stream as it
        was before; "freeze" consumes the chunk with the memory frozen and turns learning off; "skip" does the same and
        goes on learning after it.
        """
        set_guard(self._open(), policy, max_update_norm, max_surprise)

    @property
    def guard_report(self) -> GuardReport:
        """What the guard has seen since it was set."""
        return guard_report(self._open())

    def cancel(self) -> None:
        """From any thread: ends the call that runs on the stream, which raises an error of status 5 and leaves the
        stream as it was before. Does nothing where none runs.
        """
        check(lib.titans_stream_cancel(self._open()))

    @property
    def learning(self) -> bool:
        return bool(lib.titans_stream_learning(self._open()))

    @property
    def position(self) -> int:
        """Tokens consumed."""
        return int(lib.titans_stream_position(self._open()))

    @property
    def state_bytes(self) -> int:
        """Bytes that this stream owns, marks counted; they do not depend on how much it has consumed."""
        return int(lib.titans_stream_state_bytes(self._open()))

    def memory(self) -> dict[str, Floats]:
        """A copy of each field of the memory, such as "layers.0.memory.W0", as of the last complete chunk."""
        fields: dict[str, Floats] = {}
        info = MemoryInfo()
        for index in range(lib.titans_stream_memory_count(self._open())):
            check(lib.titans_stream_memory_info(self._handle, index, ctypes.byref(info)))
            values = np.empty(info.shape[: info.rank], np.float32)
            check(lib.titans_stream_memory_read(self._handle, index, _floats(values), values.size))
            fields[info.name.decode()] = values
        return fields

    def close(self) -> None:
        """Gives the state back and ends its generations. Closing twice does nothing."""
        for generation in list(self._generations):
            generation.close()
        handle, self._handle = self._handle, ctypes.c_void_p()
        lib.titans_stream_destroy(handle)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._handle:
            self.close()

    def _require_tokens(self) -> None:
        if self._form.kind != "tokens":
            advice = "feed it vectors: it has neither tokens nor logits"
            raise _wrong("a bundle that takes tokens", f"one that takes {self._form.kind}", advice)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise _wrong("an open stream", "a closed one", "make another")
        return self._handle


class _Generation(Iterator[int]):
    """What :meth:`Stream.generate` returns. It keeps the stream alive."""

    def __init__(self, stream: Stream, handle: ctypes.c_void_p, stop: list[list[int]]) -> None:
        self._stream = stream
        self._handle = handle
        self._stop = stop
        self._tail: deque[int] = deque(maxlen=max(map(len, stop), default=0))

    def __next__(self) -> int:
        tail = list(self._tail)
        if any(tail[-len(sequence) :] == sequence for sequence in self._stop):
            raise StopIteration
        token, done = ctypes.c_int32(), ctypes.c_int()
        self._stream._open()
        check(lib.titans_generator_next(self._handle, ctypes.byref(token), ctypes.byref(done)))
        if done.value:
            raise StopIteration
        self._tail.append(token.value)
        return token.value

    def close(self) -> None:
        """Ends the generation. The stream calls it before it goes."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        lib.titans_generator_destroy(handle)

    def __del__(self) -> None:
        self.close()


def whole_number(value: int, name: str, low: int, end: int) -> int:
    """The value, if it is an integer in [low, end): ctypes would cut it to size without a word."""
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(f"{name} to be an integer", repr(value), "pass one") from None
    if isinstance(value, bool) or not low <= number < end:
        raise _wrong(f"{name} in [{low}, {end})", repr(value), "choose another")
    return number


def _wrong(expected: str, got: str, advice: str) -> Error:
    return Error(f"[stream] expected {expected} but got {got}; do {advice}", INVALID_ARGUMENT)


def vector_array(vectors: Any, size: int) -> Floats:
    """Floats as (T, size), without taking token ids for numbers."""
    expected = f"float vectors of shape (T, {size}) or (T, V, {size}/V)"
    try:
        values = np.asarray(vectors)
    except ValueError as error:
        raise _wrong(expected, str(error), "pass one stream's vectors") from None
    if values.shape == (0,):
        return np.empty((0, size), np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise _wrong(expected, f"{values.dtype}", "pass floats: this bundle takes vectors, not tokens")
    if values.ndim not in (2, 3) or math.prod(values.shape[1:]) != size:
        raise _wrong(expected, f"shape {values.shape}", "pass one stream's vectors, each whole")
    with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is refused
        return np.ascontiguousarray(values.reshape(len(values), size), np.float32)


def token_array(tokens: Any) -> npt.NDArray[np.int32]:
    """Any one-dimensional sequence of integers as int32, without letting a value wrap."""
    if isinstance(tokens, (list, tuple)) and any(isinstance(token, bool) for token in tokens):
        raise _wrong("tokens as bytes or integers", "a bool", "pass token ids")
    try:
        values = np.frombuffer(tokens, np.uint8) if isinstance(tokens, (bytes, bytearray)) else np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise _wrong("tokens in one dimension", str(error), "pass one stream's tokens") from None
    if np.issubdtype(values.dtype, np.floating) and values.size > 0:
        raise _wrong("tokens as bytes or integers", str(values.dtype), "pass token ids: this bundle takes no vectors")
    if values.ndim != 1:
        raise _wrong("tokens in one dimension", f"shape {values.shape}", "pass one stream's tokens")
    if values.size == 0:
        return np.empty(0, np.int32)
    if not np.issubdtype(values.dtype, np.integer):
        raise _wrong("tokens as bytes or integers", str(values.dtype), "encode the text first")
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        raise _wrong("tokens that fit into int32", f"{values.min()} to {values.max()}", "check the tokenizer")
    return np.ascontiguousarray(values, np.int32)


def _token(token: Any) -> int:
    if type(token) is int and -(2**31) <= token < 2**31:  # one by one, arrays would take longer than small models
        return token
    return int(token_array([token])[0])


def _tokens(array: npt.NDArray[np.int32]) -> Any:
    return array.ctypes.data_as(TokenPointer)


def _floats(array: Floats) -> Any:
    return array.ctypes.data_as(FloatPointer)
