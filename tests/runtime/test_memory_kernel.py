"""What computes the memory: our kernel, where its library is there, or the graphs' own standard operators."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_errors import INVALID_ARGUMENT, UNSUPPORTED, refuse

import titans_runtime as rt
from titans_runtime._library import _library_path

FOLDER = Path(_library_path()).parent
KERNEL = "libtitans_onnxruntime_ops.so"
# A library like ours, made for something else: all it needs of ONNX Runtime is the first function of its interface.
STUB = """
#include <stdint.h>
typedef struct { void* (*create_status)(int, const char*); } Api;
typedef struct { const Api* (*get_api)(uint32_t); } ApiBase;
const char* titans_onnxruntime_ops_target(void) { return TARGET; }
void* RegisterCustomOps(void* options, const ApiBase* base) {
  return base->get_api(1)->create_status(1, "made for ONNX Runtime 9");
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The backend in a folder of its own, without the kernel."""
    shutil.copy(FOLDER / "libtitans_backend_onnxruntime.so", tmp_path)
    return tmp_path


def build_stub(folder: Path, target: str) -> None:
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    source = folder / "stub.c"
    source.write_text(STUB)
    command = [compiler, "-xc", "-shared", "-fPIC", f"-DTARGET={target}", str(source), "-o", str(folder / KERNEL)]
    subprocess.run(command, check=True)


def test_the_package_holds_the_kernel() -> None:
    if os.environ.get("TITANS_LIBRARY"):
        pytest.skip("TITANS_LIBRARY names a build, which may have been made without the kernel's headers")
    assert (Path(rt.__file__).parent / KERNEL).is_file()


def test_a_memory_that_is_no_node_is_none_of_the_kernel_s(bundle: Path) -> None:
    for choice in ({}, {"memory_kernel": "auto"}, {"memory_kernel": "off"}):
        with rt.Session(bundle, **choice) as session:
            assert session.info["memory_kernel"] == "standard-operators"
    if not (FOLDER / KERNEL).exists():
        pytest.skip("the memory kernel is not built: make setup, with its headers in .deps")
    refuse(bundle, UNSUPPORTED, 'memory_kernel="require"', "standard operators", memory_kernel="require")


def test_a_graph_without_memory_nodes_is_never_in_place(session: rt.Session) -> None:
    assert not any(state["in_place"] for state in session.info["state"])


def test_without_the_library(bundle: Path, folder: Path) -> None:
    for choice in ("auto", "off"):
        with rt.Session(bundle, plugin_dir=folder, memory_kernel=choice) as session:
            assert session.info["memory_kernel"] == "standard-operators"
            session.stream().feed([1, 2, 3])
    refuse(bundle, UNSUPPORTED, str(folder / KERNEL), "no such file", plugin_dir=folder, memory_kernel="require")


def check_of_no_use(bundle: Path, folder: Path, *words: str) -> None:
    """It is an error that names the library and the way out, unless the kernel is off."""
    for choice in ("auto", "require"):
        refuse(bundle, UNSUPPORTED, *words, 'memory_kernel="off"', plugin_dir=folder, memory_kernel=choice)
    rt.Session(bundle, plugin_dir=folder, memory_kernel="off").stream().feed([1, 2, 3])


def test_a_library_that_is_none(bundle: Path, folder: Path) -> None:
    (folder / KERNEL).write_bytes(b"\x7fELF" + b"\0" * 100)
    check_of_no_use(bundle, folder, str(folder / KERNEL), "same version")


def test_a_library_of_something_else(bundle: Path, folder: Path) -> None:
    shutil.copy(FOLDER / "libtitans_backend_onnxruntime.so", folder / KERNEL)
    check_of_no_use(bundle, folder, str(folder / KERNEL), "titans_onnxruntime_ops_target", "same version")


def test_a_library_for_another_onnxruntime(bundle: Path, folder: Path) -> None:
    build_stub(folder, '"plain"')
    check_of_no_use(bundle, folder, str(folder / KERNEL), "made for ONNX Runtime 9", "same version")


def test_an_instruction_set_that_this_machine_lacks(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_stub(folder, "0")
    monkeypatch.setenv("TITANS_CPU_TARGET", "abacus")
    check_of_no_use(bundle, folder, "TITANS_CPU_TARGET", "abacus")


@pytest.mark.parametrize("wrong", ["", "on", "Auto", "standard-operators"])
def test_a_choice_that_is_none(bundle: Path, wrong: Any) -> None:
    refuse(bundle, INVALID_ARGUMENT, "memory_kernel", "auto, require or off", memory_kernel=wrong)
