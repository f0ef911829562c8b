from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Result, environment, invoke, spawn

from titans_export import doctor

pytest_plugins = ["cli_fixtures"]

KERNEL = "libtitans_onnxruntime_ops.so"


@pytest.fixture
def runtime() -> None:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)


def test_all_is_well_here(runtime: None) -> None:
    result = invoke("doctor", "--json")
    assert result.code == 0, result.err
    report = result.json()
    assert report["export"] is report["run"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["libonnxruntime"]["version"]
    assert "CPU" in checks["libonnxruntime"]["detail"]
    for check in checks.values():
        assert check["needed_for"]
        assert check["found"] or check["fix"], check["name"]


def test_the_table_names_everything(runtime: None) -> None:
    text = invoke("doctor").out
    for check in doctor.examine():
        assert check.name in text
    assert "run on the CPU: works" in text


def test_known_memory_errors_of_onnxruntime() -> None:
    for version in ("1.21.0", "1.23.2", "1.27.1", "0.9"):
        assert "KNOWN MEMORY ERRORS" in doctor.memory_errors(version), version
    for version in ("1.28.0", "1.32.0", "2.0", "unknown"):
        assert not doctor.memory_errors(version), version


def test_no_onnxruntime(runtime: None, tmp_path: Path) -> None:
    result = spawn("doctor", "--json", TITANS_ONNXRUNTIME=str(tmp_path / "libonnxruntime.so"))
    result.check_failure(4, "libonnxruntime", "pip install onnxruntime")
    assert result.json()["run"] is False


@pytest.fixture
def library(runtime: None, tmp_path: Path) -> Path:
    """The runtime in a folder of its own, without the memory kernel."""
    from titans_runtime._library import _library_path

    here = Path(_library_path())
    shutil.copy(here, tmp_path / "libtitans.so")
    shutil.copy(here.with_name("libtitans_backend_onnxruntime.so"), tmp_path)
    return tmp_path / "libtitans.so"


def kernel_check(result: Result) -> dict[str, Any]:
    return next(check for check in result.json()["checks"] if check["name"] == "memory kernel")


def test_the_kernel_and_its_instruction_set(library: Path) -> None:
    from titans_runtime._library import _library_path

    kernel = Path(_library_path()).with_name(KERNEL)
    if not kernel.exists():
        pytest.skip("the memory kernel is not built: make setup, with its headers in .deps")
    shutil.copy(kernel, library.parent)
    result = spawn("doctor", "--json", TITANS_LIBRARY=str(library), TITANS_CPU_TARGET="plain")
    assert result.code == 0, result.err
    assert kernel_check(result)["detail"] == f"{library.parent / KERNEL} (plain)"
    result = spawn("doctor", "--json", TITANS_LIBRARY=str(library), TITANS_CPU_TARGET="abacus")
    result.check_failure(4, "memory kernel", "TITANS_CPU_TARGET")


def test_no_kernel(library: Path) -> None:
    result = spawn("doctor", "--json", TITANS_LIBRARY=str(library))
    assert result.code == 0, result.err
    assert kernel_check(result)["found"] is False


def test_a_broken_kernel(library: Path) -> None:
    (library.parent / KERNEL).touch()
    result = spawn("doctor", "--json", TITANS_LIBRARY=str(library))
    result.check_failure(4, "memory kernel", KERNEL)
    assert result.json()["run"] is False


def test_no_runtime(tmp_path: Path) -> None:
    result = spawn("doctor", "--json", TITANS_LIBRARY=str(tmp_path / "libtitans.so"))
    result.check_failure(4, "titans_runtime")
    assert result.json()["run"] is False


def test_no_torch(runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise doctor.importlib.metadata.PackageNotFoundError
        return versions(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = invoke("doctor", "--json")
    result.check_failure(4, "torch", "pip install torch")
    assert result.json()["export"] is False
    assert result.json()["run"] is True


def test_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys; from titans_export.doctor import examine; examine()\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'onnxscript', 'polygraphy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("cmake version 3.25.1\n\nCMake suite", "3.25.1"),
        ("Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0", "13.0.88"),
        ("12.2.0", "12.2.0"),
        ("none", None),
    ],
)
def test_versions_in_what_tools_print(text: str, version: str | None) -> None:
    assert doctor.find_version(text) == version
