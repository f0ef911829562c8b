"""Programs for aarch64, emulated: where they are, and what runs them."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
FETCHED = ROOT / ".deps" / "aarch64"
# That of tools/fetch_aarch64 before the system's, which may be too old to run ONNX Runtime.
QEMU = shutil.which("qemu-aarch64", path=f"{FETCHED / 'usr' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
# The neoverse-n1 is emulated many times faster than qemu's default. The libraries are those of Debian's cross-compiler,
# and what was fetched.
_LIBRARIES = ("-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={FETCHED / 'lib'}")
EMULATOR = (QEMU or "qemu-aarch64", "-cpu", "neoverse-n1", *_LIBRARIES)


def onnxruntime() -> Path | None:
    """ONNX Runtime's library for aarch64."""
    return next(iter(sorted((FETCHED / "lib").glob("libonnxruntime.so.1.*"))), None)


def why_not() -> str:
    """Why no program can be run, or nothing."""
    if platform.machine() == "aarch64":
        return "this processor is an aarch64, whose tests are the native ones"
    if QEMU is None:
        return "no qemu-aarch64: install qemu-user, or run tools/fetch_aarch64"
    return "" if BUILD.is_dir() else f"no {BUILD.relative_to(ROOT)}: make kernels, with g++-aarch64-linux-gnu installed"
