"""Looks for the dependencies of exporting and running, without loading anything heavy."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import __version__

EXPORT, RUN = "export", "run on the CPU"
SOUND_ONNXRUNTIME = (1, 28)  # the first release without known memory errors in its operators


@dataclass(frozen=True)
class Finding:
    """A dependency. `version` is None if it is missing; `required_for` lists the purposes that need it."""

    name: str
    version: str | None
    needed_for: str
    fix: str
    detail: str = ""
    required_for: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether it was found."""
        return self.version is not None


def examine() -> list[Finding]:
    """All dependencies, the most important first."""
    both = (EXPORT, RUN)
    export = (EXPORT,)
    return [
        Finding("python", platform.python_version(), "everything", "", sys.executable, both),
        Finding("titans-export", __version__, "everything", "", str(Path(__file__).parent), both),
        *_runtime(),
        _onnxruntime(),
        _package("numpy", "everything", both),
        _package("xxhash", "checking bundles", both),
        _package("safetensors", "reading checkpoints", export),
        _package("torch", "exporting, verify --against", export),
        _package("onnx", "exporting, inspect", export),
        _package("onnxscript", "exporting", export),
        _package("onnxruntime", "verify --polygraphy; brings libonnxruntime"),
        _package("polygraphy", "verify --polygraphy"),
        _package("tokenizers", "models with a tokenizer.json"),
        _tool("c++", "building the runtime", "install a C++17 compiler such as g++", "-dumpfullversion"),
        _tool("cmake", "building the runtime", "pip install cmake"),
        _driver(),
        _tool(
            "nvcc",
            "building kernels for NVIDIA GPUs",
            "install the CUDA toolkit from developer.nvidia.com/cuda-downloads",
            places=("/usr/local/cuda/bin/nvcc",),
        ),
        _library(
            "tensorrt",
            ("nvinfer",),
            "building and running engines on Jetson and datacenter GPUs",
            "install JetPack on a Jetson, or TensorRT from developer.nvidia.com/tensorrt",
        ),
        _plugin(),
        _library(
            "tensorrt-rtx",
            ("tensorrt_rtx",),
            "building engines for RTX GPUs",
            "pip install 'titans-export[rtx]'",
        ),
        _cuda_provider(),
    ]


def works(findings: list[Finding], purpose: str) -> bool:
    """Whether every dependency of `purpose` was found."""
    return all(finding.found for finding in findings if purpose in finding.required_for)


def _package(name: str, needed_for: str, required_for: tuple[str, ...] = ()) -> Finding:
    version = None
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(name)
    detail = memory_errors(version) if version and name == "onnxruntime" else ""
    return Finding(name, version, needed_for, f"pip install {name}", detail.removesuffix(": "), required_for)


def _runtime() -> list[Finding]:
    """The runtime library, its ONNX Runtime backend and the memory kernel."""
    name, needed_for, required_for = "titans_runtime", "run, verify, export", (EXPORT, RUN)
    backend, fix = "onnxruntime backend", "install titans-runtime again, with ONNX Runtime's headers in .deps"
    try:
        import titans_runtime
        from titans_runtime._library import _library_path
    except ImportError as error:
        missing = Finding(name, None, needed_for, "pip install titans-runtime", str(error), required_for)
        return [missing, Finding(backend, None, needed_for, fix, required_for=required_for), _kernel(None, None)]
    library, version = Path(_library_path()), titans_runtime.__version__
    path = library.parent / "libtitans_backend_onnxruntime.so"
    return [
        Finding(name, version, needed_for, "", str(library), required_for),
        Finding(backend, version if path.is_file() else None, needed_for, fix, str(path), required_for),
        _kernel(library.parent / "libtitans_onnxruntime_ops.so", version),
    ]


def _kernel(path: Path | None, version: str | None) -> Finding:
    """The memory kernel and its instruction set. It is optional, but a broken one stops runs."""
    name, needed_for = "memory kernel", "a faster memory, updated in place"
    fix = "install titans-runtime again, with Highway's headers in .deps"
    if path is None or not path.exists():
        return Finding(name, None, needed_for, fix, "" if path is None else f"no {path}")
    try:
        ask = ctypes.CDLL(str(path)).titans_onnxruntime_ops_target
        ask.restype = ctypes.c_char_p
        target: bytes | None = ask()
    except (OSError, AttributeError) as error:
        return Finding(name, None, needed_for, fix, str(error), (EXPORT, RUN))
    if target is None:
        reason = "TITANS_CPU_TARGET is not an instruction set of this machine"
        return Finding(name, None, needed_for, "unset TITANS_CPU_TARGET", reason, (EXPORT, RUN))
    return Finding(name, version, needed_for, fix, f"{path} ({target.decode()})")


def _onnxruntime() -> Finding:
    """The ONNX Runtime library that the runtime would open, and its execution providers."""
    name, needed_for, required_for = "libonnxruntime", "running on the CPU", (EXPORT, RUN)
    fix = "pip install onnxruntime, or set TITANS_ONNXRUNTIME to a libonnxruntime.so"
    reason = "not found"
    for path in _onnxruntime_candidates():
        try:
            version, providers = _ask_onnxruntime(path)
        except (OSError, AttributeError) as error:
            reason = str(error)
            continue
        detail = f"{memory_errors(version)}{path} ({', '.join(providers)})"
        return Finding(name, version, needed_for, fix, detail, required_for)
    return Finding(name, None, needed_for, fix, reason, required_for)


def memory_errors(version: str) -> str:
    """A warning for an ONNX Runtime whose operators have known memory errors; empty for others."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not numbers or numbers >= SOUND_ONNXRUNTIME:
        return ""
    least = ".".join(map(str, SOUND_ONNXRUNTIME))
    return f"KNOWN MEMORY ERRORS, take {least} or newer for bundles of others: "


def _onnxruntime_candidates() -> list[str]:
    """The libraries that the runtime tries, in its order."""
    if named := os.environ.get("TITANS_ONNXRUNTIME"):
        return [named]
    with suppress(ImportError):
        from titans_runtime._library import backend_library

        if found := backend_library():
            return [found]
    return ["libonnxruntime.so.1", "libonnxruntime.so"]


class _OrtApiBase(ctypes.Structure):
    _fields_ = [
        ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
        ("get_version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    ]


def _ask_onnxruntime(path: str) -> tuple[str, list[str]]:
    """Version and execution providers, through the C interface: the Python package may be another version."""
    get_providers_index, release_providers_index = 125, 126  # in OrtApi, which only ever grows at its end
    library = ctypes.CDLL(path)
    library.OrtGetApiBase.restype = ctypes.POINTER(_OrtApiBase)
    base = library.OrtGetApiBase().contents
    version = base.get_version().decode()
    table = ctypes.cast(base.get_api(17), ctypes.POINTER(ctypes.c_void_p))
    if not table:
        return version, []
    names, count = ctypes.POINTER(ctypes.c_char_p)(), ctypes.c_int()
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(table[get_providers_index] or 0)
    release = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)(table[release_providers_index] or 0)
    if get(ctypes.byref(names), ctypes.byref(count)):
        return version, []
    providers = [(names[i] or b"").decode().removesuffix("ExecutionProvider") for i in range(count.value)]
    release(names, count)
    return version, providers


def _tool(
    name: str,
    needed_for: str,
    fix: str,
    flag: str = "--version",
    places: tuple[str, ...] = (),
) -> Finding:
    path = shutil.which(name) or next((place for place in places if Path(place).is_file()), None)
    if path is None:
        return Finding(name, None, needed_for, fix)
    return Finding(name, find_version(_output([path, flag])) or "unknown", needed_for, fix, path)


def _output(command: list[str]) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    return ""


def find_version(text: str) -> str | None:
    """The version in a tool's output: the first number with the most dots."""
    found = re.findall(r"\d+(?:\.\d+)+", text)
    return max(found, key=lambda version: version.count(".")) if found else None


def _driver() -> Finding:
    """NVIDIA's driver version and the newest CUDA it supports. Avoids nvidia-smi and the GPU, which are slow."""
    cuda = None
    with suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    version = None
    with suppress(OSError):
        version = find_version(Path("/proc/driver/nvidia/version").read_text().partition("\n")[0])
    detail = ", ".join([f"CUDA up to {cuda}"] * (cuda is not None) + _gpus())
    return Finding(
        "nvidia driver",
        version or ("unknown" if cuda else None),
        "running on NVIDIA GPUs",
        "install the driver from nvidia.com/drivers",
        detail,
    )


def _gpus() -> list[str]:
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            models += re.findall(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
    return models


def _plugin() -> Finding:
    """Our TensorRT plugin, beside the runtime library or named by the environment."""
    name, needed_for = "tensorrt plugin", "the memory in TensorRT engines"
    fix = "build it, docs/tensorrt-plugin.md"
    places = [Path(named)] if (named := os.environ.get("TITANS_TENSORRT_PLUGIN")) else []
    with suppress(ImportError):
        from titans_runtime._library import _library_path

        places += sorted(Path(_library_path()).parent.glob("libtitans_tensorrt_plugin_*.so"))
    found = [path for path in places if path.is_file()]
    if not found:
        return Finding(name, None, needed_for, fix)
    majors = [match[1] for path in found if (match := re.search(r"_plugin_(\d+)\.so$", path.name))]
    version = "for TensorRT " + ", ".join(majors) if majors else "unknown"
    return Finding(name, version, needed_for, fix, ", ".join(map(str, found)))


def _cuda_provider() -> Finding:
    """ONNX Runtime's CUDA provider, a library beside its own."""
    name, needed_for, fix = (
        "onnxruntime CUDA",
        "running on NVIDIA GPUs without an engine",
        "pip install onnxruntime-gpu",
    )
    for path in _onnxruntime_candidates():
        provider = Path(path).with_name("libonnxruntime_providers_cuda.so")
        if not provider.is_file():
            continue
        with suppress(OSError, AttributeError):
            version, _ = _ask_onnxruntime(path)
            return Finding(name, version, needed_for, fix, str(provider))
    return Finding(name, None, needed_for, fix)


def _library(package: str, names: tuple[str, ...], needed_for: str, fix: str) -> Finding:
    """A library from a Python package or from the system."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return Finding(package, importlib.metadata.version(package), needed_for, fix, "Python package")
    for name in names:
        if soname := ctypes.util.find_library(name):
            return Finding(package, soname.partition(".so.")[2] or "unknown", needed_for, fix, soname)
    return Finding(package, None, needed_for, fix)
