"""What was measured on: the processor, the memory, the versions. No names of hosts, users or places."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

# Instruction sets that decide which kernels run.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
# Places in the first line of /proc/stat.
_IDLE, _IO_WAIT = 3, 4
# What others may use without it being said.
QUIET = 0.05
_PACKAGES = ("titans-export", "titans-runtime", "numpy", "onnxruntime", "torch", "onnx", "titans-pytorch")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def others_busy(seconds: float = 0.5) -> float:
    """Which part of the machine's cores others keep busy, from 0 to 1, looked at for so long while we do nothing.

    Two measurements of a machine that others use say little: threads that wait for each other wait for them too.
    """
    before = _processor_times()
    time.sleep(seconds)
    spent = [after - start for start, after in zip(before, _processor_times(), strict=True)]
    return 1 - (spent[_IDLE] + spent[_IO_WAIT]) / max(sum(spent), 1)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, caches, memory and kernel of this machine."""
    processor = _processor()
    flags = processor.get("flags", processor.get("Features", "")).split()
    return {
        "processor": processor.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "cores": cores(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }


def describe_packages() -> dict[str, str]:
    """The versions that are installed of what takes part."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_commit() -> dict[str, Any]:
    """The commit that this package is a checkout of, and whether anything that runs differs from it; None: unknown."""
    commit = _git("rev-parse", "HEAD")
    # Pages and results describe; they change nothing that runs.
    status = _git("status", "--porcelain", "--", ".", ":!docs", ":!benchmarks/results", ":!*.md")
    return {"commit": commit, "uncommitted_changes": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    """What git says about this package's checkout, None where there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor_times() -> list[int]:
    """What all cores together have spent since the system began, as /proc/stat lists it."""
    with open("/proc/stat") as file:
        return [int(field) for field in file.readline().split()[1:]]


def _processor() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo, none where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _caches() -> dict[str, str]:
    """Level and kind to size of each cache of the first core, such as {"L1 data": "32K"}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind.lower()}"] = size
    return found
