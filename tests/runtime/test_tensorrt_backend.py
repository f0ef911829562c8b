"""The TensorRT backends, built for each version with headers, on a fake driver and a fake vendor library. With the
wheel of TensorRT-RTX installed, its real library is used too, up to the point that needs a device.

TENSORRT_ROOTS, a list with colons between, or TENSORRT_ROOT names the folders that hold include/NvInferRuntime.h.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_manifest
from tensorrt_headers import header_roots, header_version
from test_engines import CUDA, FORM, entry

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "runtime" / "python"
TARGETS = ["titans", "titans_backend_tensorrt", "titans_tensorrt_tests", "titans_cuda_tests"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Built:
    version: str
    folder: Path

    @property
    def rtx(self) -> bool:
        return (self.folder / "lib" / "libtitans_backend_tensorrt_rtx.so").is_file()

    def fake(self, name: str) -> str:
        return str(self.folder / "tests" / "cpp" / f"libtitans_fake_{name}.so")


def _run(command: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


def _rtx_library() -> str | None:
    spec = find_spec("tensorrt_rtx_libs")
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return next((str(path) for folder in folders if (path := Path(folder, "libtensorrt_rtx.so.1")).is_file()), None)


@pytest.fixture(scope="module", params=header_roots())
def built(request: pytest.FixtureRequest) -> Built:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no cmake or no ninja")
    version = header_version(request.param)
    folder = ROOT / "build" / "tensorrt-runtime" / version
    configured = _run(
        ["cmake", "-G", "Ninja", "-S", ".", "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
         "-DTITANS_BUILD_TESTS=ON", "-DTITANS_WARNINGS_AS_ERRORS=ON", f"-DTENSORRT_ROOT={request.param}"]
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    if "cuda_runtime_api.h" in configured.stdout:
        pytest.skip("no headers of CUDA")
    made = _run(["cmake", "--build", folder, "--target", *TARGETS])
    assert made.returncode == 0, made.stdout + made.stderr
    return Built(version, folder)


@pytest.mark.parametrize("program", ["titans_cuda_tests", "titans_tensorrt_tests"])
def test_on_libraries_made_for_tests(built: Built, program: str) -> None:
    library = _rtx_library()
    real = {"TITANS_TEST_TENSORRT_RTX": library} if library and built.rtx else {}
    result = _run([built.folder / "tests" / "cpp" / program, "--gtest_brief=1"], **real)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[  PASSED  ]" in result.stdout
    if real and program == "titans_tensorrt_tests":
        assert "TITANS_TEST_TENSORRT_RTX names no library" not in result.stdout


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a file that is not an engine of TensorRT-RTX."""
    folder = Path(shutil.copytree(bundle, tmp_path / "engines.titans"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "rtx.engine").write_bytes(b"no engine at all")
    graphs = [{"graph": graph["name"], "file": "rtx.engine"} for graph in manifest["graphs"]]
    manifest["engines"] = [entry("rtx", graphs, **CUDA)]
    write_manifest(folder, manifest)
    return folder


def run(folder: Path, built: Built, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("titans_export")
    library = str(built.folder / "lib" / "libtitans.so")
    command = [sys.executable, "-m", "titans_export.cli", "run", folder, "--device", "cuda", "--prompt", "To be"]
    paths = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    given = {"TITANS_CUDA_DRIVER": built.fake("cuda"), "TITANS_LIBRARY": library, "PYTHONPATH": paths}
    return _run(command, **(given | environment))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TITANS_FAKE_SM": "87"}, ["made for sm 89", "sm 87", "titans-export build", "--target orin-agx"]),
        ({"TITANS_FAKE_DRIVER": "12080"}, ["CUDA 13.0", "CUDA 12.8", "update the NVIDIA driver"]),
        ({"TITANS_TENSORRT_RTX": "/nowhere/lib.so"}, ["library of tensorrt_rtx", "/nowhere/lib.so", "install"]),
        ({"TITANS_CUDA_DRIVER": "/nowhere/libcuda.so"}, ["NVIDIA driver", "/nowhere/libcuda.so"]),
    ],
    ids=["sm", "driver", "library", "no driver"],
)
def test_what_the_machine_lacks_is_exit_code_4(
    built: Built, folder: Path, environment: dict[str, str], words: list[str]
) -> None:
    if not built.rtx:
        pytest.skip(f"TensorRT {built.version} has not the classes of TensorRT-RTX")
    result = run(folder, built, **({"TITANS_TENSORRT_RTX": built.fake("tensorrt_rtx")} | environment))
    assert result.returncode == 4, result.stderr
    assert FORM.search(result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


def test_what_the_vendor_says_is_in_the_error(built: Built, folder: Path) -> None:
    if not built.rtx:
        pytest.skip(f"TensorRT {built.version} has not the classes of TensorRT-RTX")
    result = run(folder, built, TITANS_TENSORRT_RTX=built.fake("tensorrt_rtx"))
    assert result.returncode == 1, result.stderr
    assert "the plan has no header" in result.stderr
    library = _rtx_library()
    if library is None:
        pytest.skip("the wheel tensorrt-rtx is not installed")
    # Found in the wheel; it sees no engine, and on a machine without a GPU no device.
    result = run(folder, built)
    assert result.returncode == 1, result.stderr
    assert "Error Code" in result.stderr
