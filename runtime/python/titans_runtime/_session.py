"""A bundle opened on a device."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

from ._batch import feed_batch, step_batch
from ._library import INVALID_ARGUMENT, Error, SessionOptions, check, lib, vendor_libraries
from ._metrics import Metrics, read_metrics, read_metrics_text
from ._state import Key, encode_path, state_options
from ._stream import Floats, Stream, StreamFormat, Tokens, Vectors, whole_number


class Session:
    """A bundle opened on a device. Any number of threads may use it; a stream belongs to one thread at a time.

    ``device`` is "cpu", "cuda" or "cuda:N". ``engine`` names one of the bundle's engines to insist on, "none" for the
    plain graphs (None: the best that fits the device). ``backend`` insists on one (None: chosen by engine and device),
    ``threads`` is the number of threads within one call (0: the backend's default), ``backend_library`` the path of the
    vendor's library and ``plugin_dir`` the folder of the runtime's backends (None: searched, see docs/runtime.md).
    ``memory_kernel`` says what computes the memory: "auto", our kernel where it is installed; "require", fail without
    it; "off", the graphs' own standard operators.

    ``batch_threads`` is the number of threads that streams of a batch run on (0: as many as there are processors), each
    with ``threads`` of its own. ``memory_budget`` is how many bytes the state of all streams may take in memory (0: no
    limit); the streams used longest ago wait beyond it in ``spill_dir``, a folder. docs/streams.md says more.

    ``input_kind`` is "tokens" or "vectors", what streams consume; ``input_size`` and ``output_size`` are the floats of
    a vector that goes in and of one that comes out. With tokens both are ``vocab_size``, which is 0 with vectors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        backend: str | None = None,
        threads: int = 0,
        *,
        backend_library: str | os.PathLike[str] | None = None,
        plugin_dir: str | os.PathLike[str] | None = None,
        memory_kernel: str = "auto",
        engine: str | None = None,
        batch_threads: int = 0,
        memory_budget: int = 0,
        spill_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        options = SessionOptions(
            struct_size=ctypes.sizeof(SessionOptions),
            device=_encode(device),
            backend=_encode(backend),
            backend_library=_encode(backend_library),
            plugin_dir=_encode(plugin_dir),
            threads=whole_number(threads, "threads", 0, 2**31),
            memory_kernel=_encode(memory_kernel),
            engine=_encode(engine),
            libraries=_encode(vendor_libraries()),
            batch_threads=whole_number(batch_threads, "batch_threads", 0, 2**31),
            memory_budget=whole_number(memory_budget, "memory_budget", 0, 2**64),
            spill_dir=_encode(spill_dir),
        )
        check(lib.titans_session_open(_encode(path), ctypes.byref(options), ctypes.byref(self._handle)))
        self.info: dict[str, Any] = json.loads(lib.titans_session_info(self._handle))
        self.vocab_size: int = lib.titans_session_vocab_size(self._handle)
        self.input_kind: str = lib.titans_session_input_kind(self._handle).decode()
        self.input_size: int = lib.titans_session_input_size(self._handle)
        self.output_size: int = lib.titans_session_output_size(self._handle)

    def stream(self) -> Stream:
        """A stream with a fresh memory. It keeps what it needs of the session, also when that is closed."""
        handle = ctypes.c_void_p()
        check(lib.titans_stream_create(self._open(), ctypes.byref(handle)))
        return Stream(handle, self._format())

    def restore(self, path: str | os.PathLike[str], key: Key | None = None) -> Stream:
        """A stream that goes on where :meth:`Stream.save` left one, of this model, in this or another bundle of it.

        ``key`` is that of an encrypted file.
        """
        handle, options = ctypes.c_void_p(), state_options(key)
        check(lib.titans_session_restore(self._open(), encode_path(path), ctypes.byref(options), ctypes.byref(handle)))
        return Stream(handle, self._format())

    def step_batch(self, streams: Sequence[Stream], tokens: Tokens | Vectors) -> Floats:
        """Feeds each stream one token (or vector), side by side. Returns the logits after them, (B, vocab).

        Each stream and its row are bit by bit what :meth:`Stream.step` would have made of it. Where some fail the
        others have gone on, and :class:`BatchError` tells; those that failed are as they were.
        """
        return step_batch(self._open(), self._format(), streams, tokens)

    def feed_batch(
        self,
        streams: Sequence[Stream],
        sequences: Sequence[Tokens | Vectors],
        logits: Literal["all", "last", "none"] = "last",
    ) -> Floats | list[Floats] | None:
        """Feeds each stream a sequence of its own, of any length, side by side.

        Returns the logits after the last of each, (B, vocab), a list with those after each, (T, vocab), or None. Fails
        as :meth:`step_batch` does. Ctrl-C ends it: streams that were done have gone on, the others are as they were.
        """
        return feed_batch(self._open(), self._format(), streams, sequences, logits)

    def metrics(self) -> Metrics:
        """What the session has counted of its streams so far."""
        return read_metrics(self._open())

    def metrics_text(self) -> str:
        """The same in Prometheus' text format, each sample with the label ``bundle``, the folder's name."""
        return read_metrics_text(self._open())

    def close(self) -> None:
        """Gives back what no stream needs any more. Closing twice does nothing."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        lib.titans_session_close(handle)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _format(self) -> StreamFormat:
        return StreamFormat(self.input_kind, self.input_size, self.output_size)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise Error("[session] expected an open session but got a closed one; do open it again", INVALID_ARGUMENT)
        return self._handle

    def __del__(self) -> None:
        # Missing where __init__ failed before it was set.
        if getattr(self, "_handle", None):
            self.close()


def _encode(value: str | os.PathLike[str] | None) -> bytes | None:
    encoded = None if value is None else os.fsencode(value)
    if encoded is not None and b"\0" in encoded:
        raise Error(f"[session] expected text without NUL but got {value!r}; do correct it", INVALID_ARGUMENT)
    return encoded
