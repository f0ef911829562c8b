"""A bundle opened on a device."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

from ._batch import feed_batch, step_batch
from ._calls import Calls, closing, in_call
from ._library import SessionOptions, check, invalid, lib, vendor_libraries
from ._metrics import Metrics, read_metrics, read_metrics_text
from ._state import Key, encode_path, state_options
from ._stream import Floats, Stream, StreamFormat, Tokens, Vectors, whole_number
from ._text import TextSource


class Session:
    """A bundle opened on a device. Any number of threads may use it; a stream belongs to one thread at a time.

    ``device`` is "cpu", "cuda" or "cuda:N". ``engine`` is the name of an engine in the bundle, or "none" for the plain
    graphs (None: the best engine that fits the device). ``backend`` is "onnxruntime", "tensorrt" or "tensorrt_rtx"
    (None: chosen by engine and device). ``threads`` is the number of threads in one call (0: the backend's default).
    ``backend_library`` is the path of the vendor library and ``plugin_dir`` the folder of the runtime's backends (None:
    searched, see docs/runtime.md). ``memory_kernel`` is "auto" (our kernel if installed), "require" (our kernel or
    failure) or "off" (the standard operators of the graphs).

    ``batch_threads`` is the number of threads of a batch (0: one per processor), each with ``threads`` of its own.
    ``batch`` is "exact" (a stream's results in a batch are those of a call of its own, bit for bit) or "fast" (streams
    share graph calls if bundle and backend allow it, and results differ by rounding); see docs/streams.md.
    ``memory_budget`` limits the bytes of memory for the state of all streams (0: no limit). Streams beyond it, the
    least recently used, are spilled to the folder ``spill_dir``; see docs/streams.md.

    ``guard`` is the guard of new and restored streams: "bundle" (the limits and the policy of the bundle, if it has
    any), "off", or a policy of :meth:`Stream.guard` with the limits of the bundle.

    ``expect_sha256`` is the SHA-256 of the bundle, 64 hexadecimal digits as ``titans-export inspect`` prints them; with
    another one the session does not open (None: any bundle). ``operators`` is "known" (graphs may have only the
    operators that titans-export writes) or "any", for bundles of your own only; see SECURITY.md.

    ``input_kind`` is "tokens" or "vectors". ``input_size`` and ``output_size`` are the floats of an input vector and of
    an output row. With tokens both are ``vocab_size``, which is 0 with vectors. Raises :class:`Error`.
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
        guard: str = "bundle",
        batch: str = "exact",
        expect_sha256: str | None = None,
        operators: str = "known",
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._calls = Calls()
        self._path = os.path.abspath(os.fsdecode(path))
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
            guard=_encode(guard),
            batch=_encode(batch),
            expect_sha256=_encode(expect_sha256),
            operators=_encode(operators),
        )
        check(lib.titans_session_open(_encode(path), ctypes.byref(options), ctypes.byref(self._handle)))
        self.info: dict[str, Any] = json.loads(lib.titans_session_info(self._handle))
        self.vocab_size: int = lib.titans_session_vocab_size(self._handle)
        self.input_kind: str = lib.titans_session_input_kind(self._handle).decode()
        self.input_size: int = lib.titans_session_input_size(self._handle)
        self.output_size: int = lib.titans_session_output_size(self._handle)
        self._text = TextSource(self.info["tokenizer"], self._path)

    def __repr__(self) -> str:
        if not self._handle:
            return f"<titans_runtime.Session of {self._path}, closed>"
        return f"<titans_runtime.Session of {self._path} on {self.info['device']}, {self.info['backend']}>"

    @in_call
    def stream(self) -> Stream:
        """A stream at position 0 with a fresh memory. It may outlive the session."""
        made = Stream(self._format())
        check(lib.titans_stream_create(self._open(), ctypes.byref(made._handle)))
        return made

    @in_call
    def restore(self, path: str | os.PathLike[str], key: Key | None = None) -> Stream:
        """A stream that continues where a saved one of the same model was. ``key`` decrypts the file.

        The file may come from another bundle of the model, such as a quantised one.
        """
        made, options = Stream(self._format()), state_options(key)
        handle = ctypes.byref(made._handle)
        check(lib.titans_session_restore(self._open(), encode_path(path), ctypes.byref(options), handle))
        return made

    @in_call
    def step_batch(self, streams: Sequence[Stream], tokens: Tokens | Vectors) -> Floats:
        """Feeds one token or vector to each stream. Returns the outputs after them, (streams, output_size).

        With ``batch="exact"`` the results are identical to :meth:`Stream.step`. If streams fail, they are unchanged,
        the others have continued, and :class:`BatchError` is raised.
        """
        return step_batch(self._open(), self._format(), streams, tokens)

    @in_call
    def feed_batch(
        self,
        streams: Sequence[Stream],
        sequences: Sequence[Tokens | Vectors],
        outputs: Literal["all", "last", "none"] = "last",
    ) -> Floats | list[Floats] | None:
        """Feeds each stream its own sequence of any length.

        ``outputs`` selects the result: "last", the outputs after each last token, (streams, output_size); "all", a list
        of (tokens, output_size); "none", None. Fails as :meth:`step_batch`. After Ctrl-C finished streams have
        continued; the others are unchanged.
        """
        return feed_batch(self._open(), self._format(), streams, sequences, outputs)

    @in_call
    def metrics(self) -> Metrics:
        """The session's counters."""
        return read_metrics(self._open())

    @in_call
    def metrics_text(self) -> str:
        """The counters in Prometheus' text format. Each sample has the label ``bundle``, the folder's name."""
        return read_metrics_text(self._open())

    def close(self) -> None:
        """Frees everything that no stream needs. Closing twice does nothing.

        Waits for a call of another thread. Refused within a call of the same thread.
        """
        with closing(self, "session") as handle:
            lib.titans_session_close(handle)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise invalid("E0516", "session", "a session cannot be copied or pickled", "open the bundle in each process")

    def _format(self) -> StreamFormat:
        return StreamFormat(self.input_kind, self.input_size, self.output_size, self._text)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise invalid("E0515", "session", "the session is closed", "open it again")
        return self._handle

    def __del__(self) -> None:
        # Missing if __init__ failed before setting it.
        if getattr(self, "_handle", None):
            self.close()


def _encode(value: str | os.PathLike[str] | None) -> bytes | None:
    encoded = None if value is None else os.fsencode(value)
    if encoded is not None and b"\0" in encoded:
        raise invalid("E0502", "session", f"text with NUL: {value!r}", "pass text without NUL")
    return encoded
