"""Bundles that many tests read, each exported once and kept in build/test/shared for all processes and runs.

A name's folder carries a hash of everything an export depends on, so a change of the sources exports it again.

    python -m shared_bundles      makes the bundles of the C++ tests, as build/test/NAME.titans
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "test" / "shared"
SOURCES = ("titans_export", "calibration", "tests/support", "examples/checkpoints")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "titans-pytorch", "titans-runtime")
ABANDONED = 86_400  # seconds; what is older and has another hash is removed


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@lru_cache(maxsize=1)
def _key() -> str:
    """A hash of all sources and packages that decide what an export writes."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in {".py", ".toml", ".json", ".safetensors"}:
                digest.update(f"{path.relative_to(ROOT)}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _remove_abandoned(name: str, kept: Path) -> None:
    for path in KEPT.glob(f"{name}-*"):
        if path != kept and path.suffix != ".lock" and time.time() - path.stat().st_mtime > ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _make(name: str, make: Callable[[Path], object], wait: bool) -> Path | None:
    """The folder NAME.titans that `make` writes. None if another process is making it and this one shall not wait."""
    folder = KEPT / f"{name}-{_key()}"
    bundle = folder / f"{name}.titans"
    if bundle.is_dir():
        return bundle
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if not bundle.is_dir():
            aside = KEPT / f"{name}-aside-{os.getpid()}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                make(aside / bundle.name)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            _remove_abandoned(name, folder)
    return bundle


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder NAME.titans that `make` writes; it must not be changed. Only one process makes it, others wait."""
    bundle = _make(name, make, True)
    assert bundle is not None
    return bundle


def all_made_once(makes: Mapping[str, Callable[[Path], object]]) -> dict[str, Path]:
    """The folders of several names. Processes that need them at the same time share the work."""
    for name, make in makes.items():
        _make(name, make, False)
    return {name: made_once(name, make) for name, make in makes.items()}


def copy_of(name: str, make: Callable[[Path], object], folder: Path) -> Path:
    """A copy in `folder` of the bundle that `make` writes."""
    return Path(shutil.copytree(made_once(name, make), folder / f"{name}.titans"))


def mac_bytes() -> Path:
    """The shipped language model, exported with one chunk a call."""
    from titans_export.exporting import export_checkpoint

    checkpoint = ROOT / "examples" / "checkpoints" / "mac-bytes"
    return made_once("mac-bytes", lambda path: export_checkpoint(checkpoint, path, chunks_per_call=1))


def synthetic() -> Path:
    """A small model without an operator of ours."""
    from synthetic import Weights, write_bundle

    return made_once("synthetic", lambda path: write_bundle(path, Weights.random()))


def main() -> None:
    for bundle in (synthetic(), mac_bytes()):
        link = ROOT / "build" / "test" / bundle.name
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(bundle, link.parent))


if __name__ == "__main__":
    main()
