"""A stream: one sequence and the memory it has learned."""

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
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ._calls import Calls, closing, in_call
from ._guard import GuardReport, Health, guard_report, health, set_guard
from ._library import OUTPUTS, Error, FloatPointer, MemoryInfo, Sampling, TokenPointer, check, invalid, lib
from ._progress import Progress, Watched, Watcher
from ._state import Key, encode_path, state_options
from ._text import TextSource, pieces

Tokens: TypeAlias = "bytes | bytearray | Sequence[int] | npt.NDArray[np.integer[Any]]"
Vectors: TypeAlias = "npt.NDArray[np.floating[Any]] | Sequence[Any]"
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StreamFormat:
    """Input kind of a bundle, "tokens" or "vectors", the floats of an input and an output row, and the tokenizer."""

    kind: str
    input_size: int
    output_size: int
    text: TextSource


class Stream:
    """Made by :meth:`Session.stream`. A failed call leaves the stream unchanged and raises :class:`Error`."""

    def __init__(self, form: StreamFormat) -> None:
        # Its maker fills the handle in, so that nothing is left if a signal handler raises meanwhile.
        self._handle = ctypes.c_void_p()
        self._form = form
        self._calls = Calls()
        self._watcher = Watcher()
        self._generations: weakref.WeakSet[_Generation] = weakref.WeakSet()

    def __repr__(self) -> str:
        if not self._handle:
            return "<titans_runtime.Stream, closed>"
        return f"<titans_runtime.Stream at position {self.position}, {'learning' if self.learning else 'frozen'}>"

    @in_call
    def feed(
        self,
        tokens: Tokens | Vectors,
        outputs: Literal["all", "last", "none"] = "all",
        *,
        progress: Progress | None = None,
    ) -> Floats | None:
        """Consumes T tokens. Returns float32 logits: "all" (T, vocab_size), "last" (vocab_size,), or None for "none".

        A bundle that takes vectors consumes floats, (T, input_size) or (T, views, input_size / views), and returns
        output vectors instead of logits. ``progress(done, total)`` is called after each graph. An exception from it,
        :meth:`cancel` and Ctrl-C end the feed; the stream is unchanged.
        """
        if outputs not in OUTPUTS:
            raise _wrong("E0501", f"unknown outputs: {outputs!r}", "pass 'all', 'last' or 'none'")
        size = self._form.output_size
        if self._form.kind == "vectors":
            rows: npt.NDArray[Any] = vector_array(tokens, self._form.input_size)
            call, given = lib.titans_stream_feed_vectors, _floats(rows)
        else:
            rows = token_array(tokens)
            call, given = lib.titans_stream_feed, _tokens(rows)
        shape = {"all": (len(rows), size), "last": (size,), "none": (0,)}[outputs]
        out = np.empty(shape, np.float32)
        with Watched(self._open(), self._watcher, progress):
            check(call(self._open(), given, len(rows), OUTPUTS[outputs], _floats(out), out.size))
        return None if outputs == "none" else out

    def feed_text(
        self,
        text: str,
        outputs: Literal["all", "last", "none"] = "none",
        *,
        progress: Progress | None = None,
    ) -> Floats | None:
        """Consumes a text, encoded by the bundle's tokenizer without special tokens around it. See :meth:`feed`.

        A model of bytes takes the text as UTF-8. Otherwise the package ``tokenizers`` is needed. The whole text is
        encoded at once.
        """
        self._require_tokens()
        return self.feed(self._form.text.codec().encode(text), outputs, progress=progress)

    def generate_text(
        self,
        prompt: str = "",
        max_tokens: int | None = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Consumes the prompt and continues it. Yields text as soon as no later token can change it.

        The sampling options are those of :meth:`generate`. ``stop`` lists texts; the first one that appears ends the
        generation, and is the end of the text. ``"".join`` of the pieces is the whole continuation.
        """
        self._require_tokens()
        if isinstance(stop, (bytes, str)):
            raise _wrong("E0512", f"expected stop as a list, got {stop!r}", "write [stop]")
        if not all(isinstance(text, str) and text for text in stop):
            raise _wrong("E0512", f"expected texts in stop, got {list(stop)!r}", "pass strings that are not empty")
        codec = self._form.text.codec()
        if prompt:
            self.feed(codec.encode(prompt), "none")
        tokens = self.generate(max_tokens, temperature, top_k, top_p, min_p, seed)
        return pieces(tokens, codec.decoder(), stop)

    @in_call
    def step(self, token: int | Vectors) -> Floats:
        """Consumes one token and returns the logits after it, (vocab_size,) float32.

        A bundle that takes vectors consumes one vector, (input_size,), and returns one, (output_size,).
        """
        out = np.empty(self._form.output_size, np.float32)
        if self._form.kind == "vectors":
            row = vector_array([token], self._form.input_size)
            last = OUTPUTS["last"]
            check(lib.titans_stream_feed_vectors(self._open(), _floats(row), 1, last, _floats(out), out.size))
        else:
            given = ctypes.byref(ctypes.c_float.from_buffer(out.data))  # faster than _floats
            check(lib.titans_stream_step(self._open(), _token(token), given))
        return out

    @in_call
    def score(self, tokens: Tokens, *, progress: Progress | None = None) -> Floats:
        """Consumes T tokens and returns ln p of each given all tokens before it, (T,) float32.

        At position 0 the first token is scored as uniform, -ln(vocab_size). ``progress`` is as in :meth:`feed`.
        """
        self._require_tokens()
        ids = token_array(tokens)
        out = np.empty(ids.size, np.float32)
        with Watched(self._open(), self._watcher, progress):
            check(lib.titans_stream_score(self._open(), _tokens(ids), ids.size, _floats(out)))
        return out

    @in_call
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
        """Continues a stream that has consumed a token. Yields each token after the stream has consumed it.

        Temperature 0 takes the top-1 token. The filters apply in the order top_k, top_p, min_p. ``max_tokens`` None
        means no limit. ``stop`` lists token ids and sequences (bytes or token ids). A token id ends the generation
        before it is consumed or yielded. A sequence ends it after all its tokens were generated, consumed and yielded;
        the prompt does not count.
        """
        self._require_tokens()
        if isinstance(stop, (bytes, str)):
            raise _wrong("E0512", f"expected stop as a list, got {stop!r}", "write [stop]")
        if any(isinstance(entry, bool) for entry in stop):
            raise _wrong("E0512", "expected token ids and sequences in stop, got a bool", "pass token ids")
        singles = [entry for entry in stop if isinstance(entry, (int, np.integer))]
        sequences = [token_array(entry).tolist() for entry in stop if not isinstance(entry, (int, np.integer))]
        if [] in sequences:
            raise _wrong("E0512", "empty stop sequence", "leave it out")
        ids = token_array(singles)
        sampling = Sampling()
        lib.titans_sampling_init(ctypes.byref(sampling))
        sampling.temperature, sampling.top_p, sampling.min_p = temperature, top_p, min_p
        sampling.top_k = whole_number(top_k, "top_k", 0, 2**31)
        sampling.seed = whole_number(seed, "seed", 0, 2**64)
        sampling.max_tokens = -1 if max_tokens is None else whole_number(max_tokens, "max_tokens", 0, 2**63)
        sampling.stop_tokens, sampling.stop_count = _tokens(ids), ids.size
        generation = _Generation(self, sequences)
        check(lib.titans_generator_create(self._open(), ctypes.byref(sampling), ctypes.byref(generation._handle)))
        self._generations.add(generation)
        return generation

    @in_call
    def reset(self) -> None:
        """Resets to position 0 with a fresh memory. The learning flag stays; marks are removed."""
        check(lib.titans_stream_reset(self._open()))

    @in_call
    def fork(self) -> Stream:
        """A second, independent stream with the same state."""
        made = Stream(self._form)
        check(lib.titans_stream_fork(self._open(), ctypes.byref(made._handle)))
        return made

    @in_call
    def save(self, path: str | os.PathLike[str], key: Key | None = None) -> None:
        """Writes the stream to a file, NAME.tstate, for :meth:`Session.restore`. docs/state.md defines the format.

        The file is renamed into place atomically. ``key``, 32 bytes, encrypts it with AES-256-GCM.
        """
        options = state_options(key)
        check(lib.titans_stream_save(self._open(), encode_path(path), ctypes.byref(options)))

    @in_call
    def mark(self) -> int:
        """Keeps a copy of the state as a mark and returns its position."""
        position = ctypes.c_uint64()
        check(lib.titans_stream_mark(self._open(), ctypes.byref(position)))
        return position.value

    @in_call
    def rewind(self, position: int) -> None:
        """Restores the mark at ``position`` exactly, the learning flag included. Later marks are removed."""
        check(lib.titans_stream_rewind(self._open(), whole_number(position, "position", 0, 2**64)))

    @in_call
    def unmark(self, position: int) -> None:
        """Wipes and frees the mark at ``position``."""
        check(lib.titans_stream_unmark(self._open(), whole_number(position, "position", 0, 2**64)))

    @property
    @in_call
    def marks(self) -> list[int]:
        """The positions of all marks, ascending."""
        handle, count = self._open(), ctypes.c_size_t()
        check(lib.titans_stream_marks(handle, None, 0, ctypes.byref(count)))
        positions = (ctypes.c_uint64 * count.value)()
        check(lib.titans_stream_marks(handle, positions, count.value, ctypes.byref(count)))
        return list(positions)

    @in_call
    def freeze(self) -> None:
        """Freezes the memory from the next token on."""
        check(lib.titans_stream_set_learning(self._open(), 0))

    @in_call
    def resume(self) -> None:
        """Lets the memory learn again from the next token on."""
        check(lib.titans_stream_set_learning(self._open(), 1))

    @in_call
    def guard(
        self,
        policy: Literal["off", "raise", "freeze", "skip", "rewind", "decay", "restart"] = "raise",
        max_update_norm: float = math.inf,
        max_surprise: float = math.inf,
        *,
        bundle_limits: bool = True,
        restart_every: int = 0,
    ) -> None:
        """Checks each chunk update from the next call on; see docs/guard.md.

        A chunk violates the guard if W, S or the output is not finite, if ||W' - W|| / ||W|| of a layer and head
        exceeds ``max_update_norm``, if ||S|| exceeds ``max_surprise`` or, with ``bundle_limits``, if the norm of a
        field exceeds its limit in the bundle. Then "raise" fails the call and leaves the stream unchanged. "freeze"
        consumes the chunk with a frozen memory and switches learning off. "skip" consumes it with a frozen memory and
        continues learning. "rewind", "decay" and "restart" do the same and then set every memory back: to the last
        healthy mark, half of the way to the initial memory, or to the initial memory. With ``restart_every``, every
        memory is reset after each so many tokens of the stream (0: never).
        """
        every = whole_number(restart_every, "restart_every", 0, 2**64)
        set_guard(self._open(), policy, max_update_norm, max_surprise, bundle_limits, every)

    @property
    @in_call
    def guard_report(self) -> GuardReport:
        """Results of the guard since it was set."""
        return guard_report(self._open())

    @property
    @in_call
    def health(self) -> Health:
        """Whether the memory diverges; checked with and without a guard."""
        return health(self._open())

    @in_call
    def peak_norms(self) -> dict[str, float]:
        """The largest norm of each W and S that checks have seen, by the names of :meth:`memory`."""
        handle = self._open()
        norms = np.empty(lib.titans_stream_memory_count(handle), np.float32)
        check(lib.titans_stream_peak_norms(handle, _floats(norms), norms.size))
        info, peaks = MemoryInfo(), {}
        for index, norm in enumerate(norms.tolist()):
            check(lib.titans_stream_memory_info(handle, index, ctypes.byref(info)))
            if norm >= 0:
                peaks[info.name.decode()] = norm
        return peaks

    @in_call
    def cancel(self) -> None:
        """Ends the running call, which raises an error of status 5; the stream is unchanged. Any thread may call it."""
        check(lib.titans_stream_cancel(self._open()))

    @property
    @in_call
    def learning(self) -> bool:
        return bool(lib.titans_stream_learning(self._open()))

    @property
    @in_call
    def position(self) -> int:
        """Tokens or vectors consumed."""
        return int(lib.titans_stream_position(self._open()))

    @property
    @in_call
    def state_bytes(self) -> int:
        """Bytes of state owned by the stream, marks included. Independent of the position."""
        return int(lib.titans_stream_state_bytes(self._open()))

    @in_call
    def memory(self) -> dict[str, Floats]:
        """Copies of the memory fields, such as "layers.0.memory.W0", at the last complete chunk.

        Each is float32 of shape (1, heads, rows, columns).
        """
        fields: dict[str, Floats] = {}
        handle, info = self._open(), MemoryInfo()
        for index in range(lib.titans_stream_memory_count(handle)):
            check(lib.titans_stream_memory_info(handle, index, ctypes.byref(info)))
            values = np.empty(info.shape[: info.rank], np.float32)
            check(lib.titans_stream_memory_read(handle, index, _floats(values), values.size))
            fields[info.name.decode()] = values
        return fields

    def close(self) -> None:
        """Frees the state and ends its generations. Closing twice does nothing.

        Waits for a call of another thread; :meth:`cancel` ends it. Refused within a call of the same thread.
        """
        with closing(self, "stream") as handle:
            for generation in list(self._generations):
                generation.close()
            lib.titans_stream_destroy(handle)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise _wrong("E0516", "a stream cannot be copied or pickled", "call fork() for a copy, save() for a file")

    def _require_tokens(self) -> None:
        if self._form.kind != "tokens":
            fix = "feed it vectors; it has neither tokens nor logits"
            raise _wrong("E0506", f"the bundle takes {self._form.kind}, got tokens", fix)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise _wrong("E0515", "the stream is closed", "create another")
        return self._handle


class _Generation(Iterator[int]):
    """The iterator of :meth:`Stream.generate`. It keeps the stream alive."""

    def __init__(self, stream: Stream, stop: list[list[int]]) -> None:
        self._handle = ctypes.c_void_p()
        self._calls = Calls()
        self._stream = stream
        self._stop = stop
        self._tail: deque[int] = deque(maxlen=max(map(len, stop), default=0))

    @in_call
    def __next__(self) -> int:
        tail = list(self._tail)
        if any(tail[-len(sequence) :] == sequence for sequence in self._stop):
            raise StopIteration
        token, done = ctypes.c_int32(), ctypes.c_int()
        call = self._stream._calls.begin()
        try:
            self._stream._open()
            check(lib.titans_generator_next(self._handle, ctypes.byref(token), ctypes.byref(done)))
        finally:
            del call
        if done.value:
            raise StopIteration
        self._tail.append(token.value)
        return token.value

    def close(self) -> None:
        """Ends the generation. The stream calls it when it is closed."""
        with closing(self, "generation") as handle:
            lib.titans_generator_destroy(handle)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise _wrong("E0516", "a generation cannot be copied or pickled", "fork() its stream, and generate from that")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def whole_number(value: int, name: str, low: int, end: int) -> int:
    """The value if it is an integer in [low, end); ctypes would truncate others silently."""
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong("E0501", f"expected an integer as {name}, got {value!r}", "pass an integer") from None
    if isinstance(value, bool) or not low <= number < end:
        raise _wrong("E0501", f"expected {name} in [{low}, {end}), got {value!r}", "choose a value in range")
    return number


def _wrong(code: str, problem: str, fix: str) -> Error:
    return invalid(code, "stream", problem, fix)


def vector_array(vectors: Any, size: int) -> Floats:
    """Floats as (T, size). Token ids are refused."""
    expected = f"expected float vectors of shape (T, {size}) or (T, V, {size}/V), got"
    try:
        values = np.asarray(vectors)
    except ValueError as error:
        raise _wrong("E0505", f"{expected} {error}", "pass the vectors of one stream") from None
    if values.shape == (0,):
        return np.empty((0, size), np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise _wrong("E0505", f"{expected} {values.dtype}", "pass floats; this bundle takes vectors, not tokens")
    if values.ndim not in (2, 3) or math.prod(values.shape[1:]) != size:
        raise _wrong("E0505", f"{expected} shape {values.shape}", "pass whole vectors of one stream")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which is refused
        return np.ascontiguousarray(values.reshape(len(values), size), np.float32)


def token_array(tokens: Any) -> npt.NDArray[np.int32]:
    """A one-dimensional sequence of integers as int32. Values out of range are refused."""
    if isinstance(tokens, str) or (isinstance(tokens, (list, tuple)) and any(isinstance(one, str) for one in tokens)):
        problem = "expected tokens as bytes or integers, got a str"
        raise _wrong("E0504", problem, "encode the text: text.encode() for bytes, or the model's tokenizer")
    if isinstance(tokens, (list, tuple)) and any(isinstance(token, bool) for token in tokens):
        raise _wrong("E0504", "expected tokens as bytes or integers, got a bool", "pass token ids")
    try:
        values = np.frombuffer(tokens, np.uint8) if isinstance(tokens, (bytes, bytearray)) else np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise _wrong(
            "E0504", f"expected tokens in one dimension, got {error}", "pass the tokens of one stream"
        ) from None
    if np.issubdtype(values.dtype, np.floating) and values.size > 0:
        problem = f"expected tokens as bytes or integers, got {values.dtype}"
        raise _wrong("E0504", problem, "pass token ids; this bundle takes no vectors")
    if values.ndim != 1:
        problem = f"expected tokens in one dimension, got shape {values.shape}"
        raise _wrong("E0504", problem, "pass the tokens of one stream")
    if values.size == 0:
        return np.empty(0, np.int32)
    if not np.issubdtype(values.dtype, np.integer):
        raise _wrong("E0504", f"expected tokens as bytes or integers, got {values.dtype}", "encode the text first")
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        problem = f"expected tokens in int32, got {values.min()} to {values.max()}"
        raise _wrong("E0504", problem, "check the tokenizer")
    return np.ascontiguousarray(values, np.int32)


def _token(token: Any) -> int:
    if type(token) is int and -(2**31) <= token < 2**31:  # an array takes longer than a small model
        return token
    return int(token_array([token])[0])


def _tokens(array: npt.NDArray[np.int32]) -> Any:
    return array.ctypes.data_as(TokenPointer)


def _floats(array: Floats) -> Any:
    return array.ctypes.data_as(FloatPointer)
