"""A bundle opened on a device."""

from __future__ import annotations

import ctypes
import json
import os
from types import TracebackType
from typing import Any

from ._library import INVALID_ARGUMENT, Error, SessionOptions, check, lib, vendor_libraries
from ._stream import Stream, StreamFormat, whole_number


class Session:
    """A bundle opened on a device. Any number of threads may use it; a stream belongs to one thread at a time.

    ``device`` is "cpu", "cuda" or "cuda:N". ``engine`` names one of the bundle's engines to insist on, "none" for the
    plain graphs (None: the best that fits the device). ``backend`` insists on one (None: chosen by engine and device),
    ``threads`` is the number of threads within one call (0: the backend's default), ``backend_library`` the path of the
    vendor's library and ``plugin_dir`` the folder of the runtime's backends (None: searched, see docs/runtime.md).
    ``memory_kernel`` says what computes the memory: "auto", our kernel where it is installed; "require", fail without
    it; "off", the graphs' own standard operators.

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
        )
        check(lib.titans_session_open(_encode(path), ctypes.byref(options), ctypes.byref(self._handle)))
        self.info: dict[str, Any] = json.loads(lib.titans_session_info(self._handle))
        self.vocab_size: int = lib.titans_session_vocab_size(self._handle)
        self.input_kind: str = lib.titans_session_input_kind(self._handle).decode()
        self.input_size: int = lib.titans_session_input_size(self._handle)
        self.output_size: int = lib.titans_session_output_size(self._handle)

    def stream(self) -> Stream:
        """A stream with a fresh memory. It keeps what it needs of the session, also when that is closed."""
        if not self._handle:
            raise Error("[session] expected an open session but got a closed one; do open it again", INVALID_ARGUMENT)
        handle = ctypes.c_void_p()
        check(lib.titans_stream_create(self._handle, ctypes.byref(handle)))
        return Stream(handle, StreamFormat(self.input_kind, self.input_size, self.output_size))

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

    def __del__(self) -> None:
        # Missing where __init__ failed before it was set.
        if getattr(self, "_handle", None):
            self.close()


def _encode(value: str | os.PathLike[str] | None) -> bytes | None:
    encoded = None if value is None else os.fsencode(value)
    if encoded is not None and b"\0" in encoded:
        raise Error(f"[session] expected text without NUL but got {value!r}; do correct it", INVALID_ARGUMENT)
    return encoded
