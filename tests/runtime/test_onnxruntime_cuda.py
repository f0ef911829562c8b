"""ONNX Runtime on CUDA without a GPU: the backend on a driver and a provider made for tests (tests/cpp/fake_cuda*).

The CPU provider computes, and what the driver puts into a stream is done as late as CUDA allows. So buffers on the
device, copies and their order, in-place states and refusals are real; the GPU's kernels are not tested here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hyper_nodes import MORE_THAN_THE_KERNEL_TAKES, add_connections

from titans_runtime._library import _library_path, backend_library

pytest_plugins = ["export_fixtures"]

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "tests" / "cpp"
FOLDER = Path(_library_path()).parent
KERNEL = "libtitans_onnxruntime_ops.so"
# In a process of its own, since a process opens one driver and one ONNX Runtime.
PROGRAM = """
import json, os, sys
from pathlib import Path
import numpy as np
import titans_runtime as rt
from titans_export.bundle import read_bundle
from titans_export.verifying import verify_stream

path, options = Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    session = rt.Session(path, backend="onnxruntime", engine="none", **options)
except rt.Error as error:
    print(json.dumps({"status": error.status, "error": str(error)}))
    sys.exit()
bundle = read_bundle(path)
golden = bundle.golden()
tokens, logits = golden.inputs, golden.values
report = verify_stream(session, tokens, golden, bundle.tolerance)
stream, twin = session.stream(), session.stream()
stream.feed(tokens[:70]), twin.feed(tokens[:70])
fork = stream.fork()
failed = None
os.environ["TITANS_FAKE_FAULT"] = "the device found a gate that is not finite"
try:
    stream.feed(tokens[70:90])
except rt.Error as error:
    failed = str(error)
os.environ.pop("TITANS_FAKE_FAULT", None)
after, right, forked = (s.feed(tokens[70:90]) for s in (stream, twin, fork))
print(json.dumps({
    "info": session.info, "passed": report.passed, "distance": report.max_abs_error, "failed": failed,
    "as_before": bool(np.array_equal(after, right)), "fork": bool(np.array_equal(forked, right)),
    "memory": float(max(np.abs(a - b).max() for a, b in zip(stream.memory().values(), twin.memory().values()))),
}))
"""


def _compile(source: Path, output: Path, *options: str) -> Path:
    compiler = shutil.which("c++" if source.suffix == ".cpp" else "cc")
    if compiler is None:
        pytest.skip("no compiler to make a library with")
    subprocess.run([compiler, "-shared", "-fPIC", *options, str(source), "-o", str(output), "-ldl"], check=True)
    return output


def _folder_with(*headers: str) -> list[str]:
    """-I for the first of each header that is there."""
    roots = [ROOT / ".deps/usr/include/onnxruntime", Path("/usr/include/onnxruntime"), Path("/usr/local/cuda/include")]
    found = []
    for header in headers:
        folder = next((folder for folder in roots if (folder / header).is_file()), None)
        if folder is None:
            pytest.skip(f"no {header} to make a driver with")
        found.append(f"-I{folder}")
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with a GPU, and the runtime's backend beside a library of operators for it."""
    if backend_library() is None:
        pytest.skip("no installed ONNX Runtime")
    if not (FOLDER / KERNEL).exists():
        pytest.skip("the memory kernel is not built: make setup, with its headers in .deps")
    includes = _folder_with("cuda.h", "onnxruntime_c_api.h")
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copy(FOLDER / "libtitans_backend_onnxruntime.so", folder)
    _compile(CPP / "fake_cuda_ops.c", folder / KERNEL)
    driver = _compile(CPP / "fake_cuda.cpp", folder / "libcuda.so.1", "-std=c++17", *includes)
    provider = _compile(CPP / "fake_cuda_onnxruntime.cpp", folder / "libonnxruntime.so.1", "-std=c++17", *includes)
    return {
        "TITANS_CUDA_DRIVER": str(driver),
        "TITANS_ONNXRUNTIME": str(provider),
        "TITANS_REAL_ONNXRUNTIME": str(backend_library()),
        "TITANS_REAL_OPS": str(FOLDER / KERNEL),
        "PLUGIN_DIR": str(folder),
    }


def _run(machine: dict[str, str], bundle: Path, device: str = "cuda", **changes: str) -> dict[str, Any]:
    options = {"device": device, "plugin_dir": machine["PLUGIN_DIR"]}
    options |= {name: changes.pop(name) for name in ("memory_kernel",) if name in changes}
    environment = {**os.environ, **machine, **changes, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bundle), json.dumps(options)],
        capture_output=True, text=True, env=environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    if "was built without CUDA's headers" in str(answer.get("error")):
        pytest.skip("the runtime was built without CUDA's headers")
    return answer


@pytest.mark.parametrize("integrated", ["0", "1"], ids=["own-memory", "shared-memory"])
@pytest.mark.parametrize("variant", ["mac", "lmm"])
def test_our_kernel_on_the_device(
    machine: dict[str, str], bundles: dict[str, Path], variant: str, integrated: str
) -> None:
    answer = _run(machine, bundles[variant], TITANS_FAKE_INTEGRATED=integrated)
    assert answer.get("passed"), answer
    assert answer["info"]["memory_kernel"] == "cuda-sm89"
    assert answer["info"]["device"] == "cuda"
    kinds = {state["role"]: state["in_place"] for state in answer["info"]["state"]}
    assert kinds["memory"], "two buffers for a memory that our kernel owns"
    assert answer["fork"]
    assert "the device found a gate that is not finite" in answer["failed"]
    assert answer["as_before"], "a call that failed has changed the stream"
    assert answer["memory"] == 0


def test_standard_operators_on_the_device(machine: dict[str, str], bundles: dict[str, Path]) -> None:
    answer = _run(machine, bundles["mag"], memory_kernel="off")
    assert answer.get("passed"), answer
    assert answer["info"]["memory_kernel"] == "standard-operators"
    assert not any(state["in_place"] for state in answer["info"]["state"])


def test_a_memory_that_would_go_to_the_cpu_in_each_call_is_refused(
    machine: dict[str, str], bundles: dict[str, Path]
) -> None:
    answer = _run(machine, bundles["mac"], TITANS_FAKE_FALLBACK="1")
    assert answer["status"] == 1
    assert "NeuralMemory nodes on the GPU, got 0 there and" in answer["error"]
    assert 'memory_kernel="off"' in answer["error"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TITANS_FAKE_NO_PROVIDER": "1"}, ["has no CUDAExecutionProvider", "onnxruntime-gpu"]),
        ({"TITANS_FAKE_PROVIDER_BROKEN": "no libcudnn.so.9"}, ["Fake GPU", "no libcudnn.so.9", "CUDA and cuDNN"]),
        ({"TITANS_FAKE_NO_KERNEL": "a library without CUDA"}, ["does not run on this GPU: a library without CUDA"]),
        ({"TITANS_CUDA_DRIVER": "/nowhere/libcuda.so.1"}, ["no usable NVIDIA driver and GPU", "nvidia-smi"]),
    ],
    ids=["no-provider", "broken-provider", "no-kernel", "no-driver"],
)
def test_a_machine_that_cannot_says_what_is_missing(
    machine: dict[str, str], bundles: dict[str, Path], changes: dict[str, str], words: list[str]
) -> None:
    answer = _run(machine, bundles["mac"], **changes)
    assert answer["status"] == 4, answer
    for word in words:
        assert word in answer["error"]


def test_a_second_device(machine: dict[str, str], bundles: dict[str, Path]) -> None:
    two = {"TITANS_FAKE_DEVICES": "2", "TITANS_FAKE_ORDINAL": "1"}
    assert _run(machine, bundles["lmm"], device="cuda:1", **two).get("passed")
    assert _run(machine, bundles["lmm"], device="cuda:2", **two)["status"] == 4


def test_hyper_connections_run_as_functions_on_the_device(
    machine: dict[str, str], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Their kernel is the CPU's, and it refuses these nodes."""
    path = Path(shutil.copytree(bundles["lmm"], tmp_path / "connected.titans"))
    add_connections(path, MORE_THAN_THE_KERNEL_TAKES)
    answer = _run(machine, path)
    assert answer.get("passed"), answer
    assert answer["info"]["memory_kernel"] == "cuda-sm89"
    assert "[HyperConnection] invalid attribute iterations" in _run(machine, path, device="cpu")["error"]
