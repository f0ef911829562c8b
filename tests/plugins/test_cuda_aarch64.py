"""What `make cuda-jetson` makes: the CUDA kernel, plugin and backend for Jetson, compiled on another processor.

None of it runs here: what is looked at is what a loader on the board would look at.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-aarch64"
RUNNER = BUILD / "bin" / "neural_memory_run_cuda"
# Ubuntu 22.04's, so JetPack 6's.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
ALLOWED = {"libc", "libm", "libstdc++", "libgcc_s", "ld-linux-aarch64"}

pytestmark = pytest.mark.skipif(
    not RUNNER.exists(), reason=f"no {RUNNER.relative_to(ROOT)}: make cuda-jetson, with nvcc and g++-aarch64-linux-gnu"
)


def read(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def check_loadable(path: Path) -> None:
    told = read("readelf", "-W", "-h", "-d", "-V", path)
    assert "AArch64" in told
    assert set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", told)) <= ALLOWED
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", told):
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{path.name} needs {name}_{version}"


def check_gpus(path: Path) -> None:
    """Code for both boards, as the assembler's options beside each of the file's GPU programs tell."""
    assert set(re.findall(rb"-arch sm_(\d+)", path.read_bytes())) == {b"87", b"110"}


def test_the_kernel_and_its_program() -> None:
    check_loadable(RUNNER)
    check_gpus(RUNNER)


def test_the_plugin_and_the_backend() -> None:
    plugins = sorted((BUILD / "lib").glob("libtitans_tensorrt_plugin_*.so"))
    if not plugins:
        pytest.skip("no plugin: TENSORRT_ROOT=FOLDER make cuda-jetson")
    for plugin in plugins:
        check_loadable(plugin)
        exported = set(re.findall(r" T (\w+)", read("nm", "-D", "--defined-only", plugin)))
        assert exported == {"getCreators", "setLoggerFinder"}
        check_gpus(plugin)
        major = plugin.stem.rpartition("_")[2]
        backend = plugin.with_name(f"libtitans_backend_tensorrt_{major}.so")
        check_loadable(backend)
        assert " T titans_backend_entry" in read("nm", "-D", "--defined-only", backend)
