"""Finds this machine's NVIDIA GPU and CUDA toolkit, and describes them for reports."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from titans_export.bench.machine import describe_commit, describe_machine
from titans_export.errors import MachineError

ROOT = Path(__file__).parents[1]
WHERE = "gpu_check"
# Fields of nvidia-smi by their names in reports, which include units.
FIELDS = {
    "name": "name",
    "compute_capability": "compute_cap",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "power_limit_w": "power.limit",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_max_mhz": "clocks.max.mem",
    "mig": "mig.mode.current",
}
# Sources that affect the results. A report merges parts only if these are unchanged.
SOURCES = ("plugins", "cmake", "benchmarks", "tests")
SUFFIXES = {".cc", ".cpp", ".cu", ".cuh", ".h", ".txt", ".cmake", ".py"}

Runner = Callable[[Sequence[str]], str]


def run(command: Sequence[str]) -> str:
    """The command's stdout. Raises OSError or CalledProcessError."""
    return subprocess.run(list(command), capture_output=True, text=True, check=True).stdout


def find_gpu(runner: Runner = run) -> dict[str, Any]:
    """The first GPU as reported by nvidia-smi, with `sm` as in sm_90. Raises MachineError without a GPU."""
    fix = "run this on a machine with an NVIDIA GPU and its driver"
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        lines = runner(command).strip().splitlines()
    except FileNotFoundError:
        raise MachineError("E0910", WHERE, "no NVIDIA GPU: nvidia-smi is missing", fix) from None
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stdout", "") or getattr(error, "stderr", "") or str(error)
        raise MachineError("E0910", WHERE, f"no NVIDIA GPU: nvidia-smi failed: {said}", fix) from None
    if not lines:
        raise MachineError("E0910", WHERE, "no NVIDIA GPU: nvidia-smi lists none", fix)
    gpu = dict(zip(FIELDS, (_number(field.strip()) for field in lines[0].split(",")), strict=True))
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(gpu["compute_capability"]))
    if capability is None:
        problem = f"nvidia-smi reports no compute capability: {gpu['compute_capability']}"
        raise MachineError("E0910", WHERE, problem, "install a newer driver")
    return {**gpu, "sm": int(capability[1]) * 10 + int(capability[2])}


def find_toolkit(which: Callable[[str], str | None] = shutil.which, runner: Runner = run) -> dict[str, str]:
    """The compiler, its version, and compute-sanitizer if present. Raises MachineError without a compiler."""
    folders = (Path("/usr/local/cuda/bin"),)
    nvcc = which("nvcc") or _first(folders, "nvcc")
    if nvcc is None:
        fix = "install the CUDA toolkit, 12.6 or newer, and put its bin folder on PATH"
        raise MachineError("E1101", WHERE, "no CUDA compiler: nvcc is not on PATH or in /usr/local/cuda/bin", fix)
    version = re.search(r"release (\d+\.\d+)", runner([nvcc, "--version"]))
    found = {"nvcc": nvcc, "cuda": version[1] if version else "unknown"}
    sanitizer = which("compute-sanitizer") or _first((Path(nvcc).parent,), "compute-sanitizer")
    return found | ({"compute_sanitizer": sanitizer} if sanitizer else {})


def describe(gpu: dict[str, Any], toolkit: dict[str, str]) -> dict[str, Any]:
    """The fields of a report besides its parts. They are equal in all runs on the same machine and sources."""
    return {
        **describe_commit(),
        "sources": hash_sources(),
        "device": gpu,
        "cuda": toolkit["cuda"],
        "machine": describe_machine(),
    }


def hash_sources(root: Path = ROOT, folders: Iterable[str] = SOURCES) -> str:
    """One hash over everything that is compiled, tested or timed."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in SUFFIXES and "results" not in path.parts:
                found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _first(folders: Iterable[Path], name: str) -> str | None:
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def _number(text: str) -> str | float | int:
    try:
        value = float(text)
    except ValueError:
        return text
    # A compute capability is a name, so 9.0 must not become 9.
    return text if re.fullmatch(r"\d+\.\d", text) else int(value) if value.is_integer() else value
