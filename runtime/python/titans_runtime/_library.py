"""The C interface (titans.h) for ctypes: finds the library, declares its functions, turns statuses into errors.

The structures have the fields of titans.h; tests/runtime/test_structs.py compares sizes and offsets.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
from pathlib import Path

OK, FAILED, INVALID_ARGUMENT, UNSUPPORTED, CANCELLED = 0, 1, 2, 4, 5
OUTPUTS = {"none": 0, "last": 1, "all": 2}  # titans_output

FloatPointer = ctypes.POINTER(ctypes.c_float)
BytePointer = ctypes.POINTER(ctypes.c_uint8)
PositionPointer = ctypes.POINTER(ctypes.c_uint64)
TokenPointer = ctypes.POINTER(ctypes.c_int32)


class SessionOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("device", ctypes.c_char_p),
        ("backend", ctypes.c_char_p),
        ("backend_library", ctypes.c_char_p),
        ("plugin_dir", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("memory_kernel", ctypes.c_char_p),
        ("engine", ctypes.c_char_p),
        ("libraries", ctypes.c_char_p),
        ("batch_threads", ctypes.c_int32),
        ("memory_budget", ctypes.c_uint64),
        ("spill_dir", ctypes.c_char_p),
        ("guard", ctypes.c_char_p),
        ("batch", ctypes.c_char_p),
        ("expect_sha256", ctypes.c_char_p),
        ("operators", ctypes.c_char_p),
    ]


class Feed(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("tokens", TokenPointer),
        ("vectors", FloatPointer),
        ("count", ctypes.c_size_t),
        ("which", ctypes.c_int),
        ("outputs", FloatPointer),
        ("capacity", ctypes.c_size_t),
    ]


class StateOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("key", BytePointer),
        ("key_bytes", ctypes.c_size_t),
    ]
    kept: object  # the memory that `key` points to


# The callbacks of titans.h.
LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
ProgressFunction = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)


class Guard(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("policy", ctypes.c_int32),
        ("max_update_norm", ctypes.c_float),
        ("max_surprise", ctypes.c_float),
        ("restart_every", ctypes.c_uint64),
        ("bundle_limits", ctypes.c_int32),
    ]


class RawGuardReport(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("rollbacks", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("reason", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("head", ctypes.c_int32),
        ("update_norm", ctypes.c_float),
        ("surprise", ctypes.c_float),
        ("chunks", ctypes.c_uint64),
        ("peak_update_norm", ctypes.c_float),
        ("peak_surprise", ctypes.c_float),
        ("field", ctypes.c_char_p),
        ("value", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("repairs", ctypes.c_uint64),
    ]


class RawHealth(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("state", ctypes.c_int32),
        ("divergences", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("field", ctypes.c_char_p),
        ("layer", ctypes.c_int32),
        ("head", ctypes.c_int32),
        ("value", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("checks", ctypes.c_uint64),
    ]


class RawDurations(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_uint64),
        ("sum_seconds", ctypes.c_double),
        ("p50_seconds", ctypes.c_double),
        ("p90_seconds", ctypes.c_double),
        ("p99_seconds", ctypes.c_double),
        ("max_seconds", ctypes.c_double),
    ]


class RawMetrics(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("streams", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
        ("chunk_updates", ctypes.c_uint64),
        ("rollbacks", ctypes.c_uint64),
        ("cancelled", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("spilled", ctypes.c_uint64),
        ("restored", ctypes.c_uint64),
        ("state_bytes", ctypes.c_uint64),
        ("resident_bytes", ctypes.c_uint64),
        ("step", RawDurations),
        ("feed", RawDurations),
        ("diverging", ctypes.c_uint64),
        ("divergences", ctypes.c_uint64),
        ("repairs", ctypes.c_uint64),
    ]


class MemoryInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_size_t),
        ("elements", ctypes.c_size_t),
    ]


class Sampling(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("max_tokens", ctypes.c_int64),
        ("stop_tokens", TokenPointer),
        ("stop_count", ctypes.c_size_t),
    ]


class Error(RuntimeError):
    """A failure of the runtime: "[where] problem. Fix: what to do (TITANS-E0204)".

    ``status`` is 1 (failed), 2 (invalid argument), 4 (not possible on this machine) or 5 (cancelled). ``code`` is the
    kind, such as "TITANS-E0204"; docs/errors.md lists the kinds.
    """

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def failure(code: str, where: str, problem: str, fix: str, status: int) -> Error:
    """An error in the form of the C interface."""
    message = " ".join(f"[{where}] {problem}. Fix: {fix} (TITANS-{code})".split())
    return Error(message, status, f"TITANS-{code}")


def invalid(code: str, where: str, problem: str, fix: str) -> Error:
    """An error about an argument."""
    return failure(code, where, problem, fix, INVALID_ARGUMENT)


def _library_path() -> str:
    """$TITANS_LIBRARY, for runtime development, or the library beside this file."""
    return os.environ.get("TITANS_LIBRARY") or str(Path(__file__).with_name("libtitans.so"))


def _load() -> ctypes.CDLL:
    path = _library_path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"[titans_runtime] cannot open the library {path}: {error}. Fix: run pip install ./runtime/python, or set "
            "TITANS_LIBRARY to a built libtitans.so (TITANS-E0604)"
        ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    out = ctypes.POINTER(ctypes.c_void_p)
    status = ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "version": (ctypes.c_char_p, []),
        "last_error": (ctypes.c_char_p, []),
        "last_error_code": (ctypes.c_char_p, []),
        "session_open": (status, [ctypes.c_char_p, ctypes.POINTER(SessionOptions), out]),
        "session_close": (None, [pointer]),
        "session_info": (ctypes.c_char_p, [pointer]),
        "session_metrics": (status, [pointer, ctypes.POINTER(RawMetrics)]),
        "session_metrics_text": (status, [pointer, ctypes.c_char_p, size, ctypes.POINTER(size)]),
        "session_vocab_size": (ctypes.c_int32, [pointer]),
        "session_input_kind": (ctypes.c_char_p, [pointer]),
        "session_input_size": (size, [pointer]),
        "session_output_size": (size, [pointer]),
        "stream_create": (status, [pointer, out]),
        "stream_destroy": (None, [pointer]),
        "stream_fork": (status, [pointer, out]),
        "stream_save": (status, [pointer, ctypes.c_char_p, ctypes.POINTER(StateOptions)]),
        "session_restore": (status, [pointer, ctypes.c_char_p, ctypes.POINTER(StateOptions), out]),
        "state_read": (
            status,
            [ctypes.c_char_p, ctypes.POINTER(StateOptions), BytePointer, size, ctypes.POINTER(size)],
        ),
        "stream_mark": (status, [pointer, PositionPointer]),
        "stream_rewind": (status, [pointer, ctypes.c_uint64]),
        "stream_unmark": (status, [pointer, ctypes.c_uint64]),
        "stream_marks": (status, [pointer, PositionPointer, size, ctypes.POINTER(size)]),
        "stream_reset": (status, [pointer]),
        "stream_feed": (status, [pointer, TokenPointer, size, ctypes.c_int, FloatPointer, size]),
        "stream_feed_vectors": (status, [pointer, FloatPointer, size, ctypes.c_int, FloatPointer, size]),
        "stream_step": (status, [pointer, ctypes.c_int32, FloatPointer]),
        "stream_score": (status, [pointer, TokenPointer, size, FloatPointer]),
        "stream_set_learning": (status, [pointer, ctypes.c_int]),
        "stream_learning": (ctypes.c_int, [pointer]),
        "stream_position": (ctypes.c_uint64, [pointer]),
        "stream_set_guard": (status, [pointer, ctypes.POINTER(Guard)]),
        "stream_guard_report": (status, [pointer, ctypes.POINTER(RawGuardReport)]),
        "stream_health": (status, [pointer, ctypes.POINTER(RawHealth)]),
        "stream_peak_norms": (status, [pointer, FloatPointer, size]),
        "stream_set_progress": (status, [pointer, ProgressFunction, pointer]),
        "stream_cancel": (status, [pointer]),
        "set_log": (status, [LogFunction, pointer, ctypes.c_int32]),
        "stream_state_bytes": (ctypes.c_uint64, [pointer]),
        "stream_memory_count": (size, [pointer]),
        "stream_memory_info": (status, [pointer, size, ctypes.POINTER(MemoryInfo)]),
        "stream_memory_read": (status, [pointer, size, FloatPointer, size]),
        "session_feed_batch": (status, [pointer, ctypes.POINTER(Feed), size, ctypes.POINTER(ctypes.c_int)]),
        "session_step_batch": (
            status,
            [pointer, out, TokenPointer, size, FloatPointer, ctypes.POINTER(ctypes.c_int)],
        ),
        "sampling_init": (None, [ctypes.POINTER(Sampling)]),
        "generator_create": (status, [pointer, ctypes.POINTER(Sampling), out]),
        "generator_next": (status, [pointer, TokenPointer, ctypes.POINTER(ctypes.c_int)]),
        "generator_destroy": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"titans_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


lib = _load()


def last_error() -> tuple[str, str]:
    """Text and code of this thread's last failure."""
    return lib.titans_last_error().decode("utf-8", "replace"), lib.titans_last_error_code().decode()


def check(status: int) -> None:
    """Raises the last failure unless ``status`` is OK."""
    if status != OK:
        message, code = last_error()
        raise Error(message, status, code)


def backend_library() -> str | None:
    """Path of libonnxruntime in an installed wheel, which the loader does not search. The wheel is not imported.

    None if $TITANS_ONNXRUNTIME is set, because the runtime reads it.
    """
    if os.environ.get("TITANS_ONNXRUNTIME"):
        return None
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    found = sorted(glob.glob(str(Path(spec.origin).parent / "capi" / "libonnxruntime.so.1*")))
    return found[-1] if found else None


# Wheels with a vendor library, which the loader does not search: backend module, package, and library. For ONNX Runtime
# see `backend_library`.
_VENDOR_LIBRARIES = (
    ("tensorrt_10", "tensorrt_libs", "libnvinfer.so.10"),
    ("tensorrt_11", "tensorrt_libs", "libnvinfer.so.11"),
    ("tensorrt_rtx", "tensorrt_rtx_libs", "libtensorrt_rtx.so.1"),
)


def vendor_libraries() -> str:
    """Vendor libraries in installed wheels as MODULE=PATH lines (titans.h, ``libraries``). No wheel is imported."""
    found = {"onnxruntime": backend_library()}
    for module, package, name in _VENDOR_LIBRARIES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            path = Path(folder, name)
            if path.is_file():
                found.setdefault(module, str(path))
    return "\n".join(f"{module}={path}" for module, path in found.items() if path)
