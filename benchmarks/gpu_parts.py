"""The parts of a GPU check, except timing: build, tests, sanitizers, and end-to-end runs of runtimes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import read_answer, sanitizer_rows, write_case
from benchmarks.reference import errors, recurrence
from titans_export.errors import MachineError, TitansError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
PROGRAM = BUILD / "bin" / "neural_memory_run_cuda"
PLUGIN_HOST = BUILD / "bin" / "tensorrt_plugin_host"
TARGETS = ("neural_memory_run_cuda",)
PLUGIN_TARGETS = ("titans_tensorrt_plugin", "tensorrt_plugin_host")
ALIASES = ("declared", "undeclared", "two-buffers")
TESTS = ("tests/plugins/test_kernel.py", "tests/plugins/test_cuda_kernel.py")
# Selects the tests that run on the GPU.
ON_GPU = "cuda-gpu"
TOOLS = ("memcheck", "racecheck")
WHERE = "gpu_check"
# The exit code of compute-sanitizer if it reports an error.
FOUND = 86
_LAST_LINES = 25


def build(sm: int, nvcc: str, jobs: int, tensorrt_root: str | None) -> dict[str, Any]:
    """Configures and compiles the other parts' programs, for this GPU only."""
    if shutil.which("cmake") is None:
        raise MachineError("E1101", WHERE, "cmake is not on PATH", "pip install cmake ninja")
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DTITANS_CUDA=ON", "-DTITANS_CUDA_PTX=OFF", f"-DTITANS_CUDA_ARCHITECTURES={architecture(sm)}",
    ]  # fmt: skip
    targets = list(TARGETS)
    if tensorrt_root:
        configure += [f"-DTENSORRT_ROOT={tensorrt_root}", "-DTITANS_BUILD_TESTS=ON"]
        targets += PLUGIN_TARGETS
    compile_with(configure)
    began = time.monotonic()
    compile_with(["cmake", "--build", str(BUILD), "-j", str(jobs), "--target", *targets])
    if not PROGRAM.is_file():
        raise TitansError("E1104", WHERE, f"the build made no {PROGRAM.name}", "check that CMake finds a CUDA compiler")
    return {"architecture": architecture(sm), "targets": targets, "compile_s": time.monotonic() - began}


def architecture(sm: int) -> str:
    """The architecture in CMake's form; Hopper's own instructions need 90a."""
    return "90a" if sm == 90 else str(sm)


def test(timeout_s: float) -> dict[str, Any]:
    """Tests the kernel against float64 over the whole table of tests, on the GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise MachineError("E1101", WHERE, "pytest is not installed", "pip install pytest pytest-timeout safetensors")
    require_built(PROGRAM)
    environment = dict(os.environ, TITANS_CUDA_RUNNER=str(PROGRAM))
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        outcomes = Path(folder, "outcomes.xml")
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", ON_GPU, "-m", "", "-p", "no:cacheprovider"]
        command += [f"--junitxml={outcomes}"]
        if importlib.util.find_spec("xdist") is not None:  # most of a test's time is the oracle on the CPU
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            problem = f"the tests did not end in {timeout_s:.0f} s"
            raise TitansError("E1106", WHERE, problem, "give more time with --seconds") from None
        found = read_outcomes(outcomes)
    if done.returncode or not found["passed"] or found["skipped"]:
        reasons = [*found["failures"], *found["skip_reasons"]]
        got = "; ".join(reasons) or " ".join(done.stdout.splitlines()[-3:]) or "none that ran"
        raise TitansError(
            "E1106", WHERE, f"tests failed on the GPU: {got}", f"run pytest {' '.join(TESTS)} -k {ON_GPU}"
        )
    return {"files": list(TESTS), **found}


def test_plugin(tensorrt_root: str | None) -> dict[str, Any]:
    """Tests the plugin against the recurrence, called as TensorRT would call it, with every kind of aliasing."""
    if not tensorrt_root:
        raise MachineError(
            "E1101", WHERE, "TensorRT's headers are missing", "give --tensorrt-root, the folder with include/"
        )
    require_built(PLUGIN_HOST)
    libraries = sorted((BUILD / "lib").glob("libtitans_tensorrt_plugin_*.so"))
    if not libraries:
        raise MachineError("E0908", WHERE, "the plugin library is missing", "run --part build --tensorrt-root again")
    rows = []
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        case, out = Path(folder, "case.safetensors"), Path(folder, "out.bin")
        for row, alias in itertools.product(sanitizer_rows(), ALIASES):
            write_case(row, case)
            command = [PLUGIN_HOST, "--gpu", case, out, "--plugin", libraries[-1], "--alias", alias]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
            if done.returncode:
                problem = f"the plugin failed in {row.name}, {alias}: {done.stderr.strip()}"
                raise TitansError("E1106", WHERE, problem, "correct the plugin")
            wrong = errors(read_answer(row, out), recurrence(row.case))
            if not max(wrong.values()) <= row.tolerance:
                got = f"expected an error of at most {row.tolerance}, got {max(wrong.values()):.3g}"
                problem = f"the plugin is incorrect in {row.name}, {alias}: {got}"
                raise TitansError("E1106", WHERE, problem, "correct the plugin")
            rows.append({"name": row.name, "alias": alias, "max_error": max(wrong.values())})
    return {"library": libraries[-1].name, "rows": rows}


def read_outcomes(path: Path) -> dict[str, Any]:
    """Counts, failures by name and reasons for skips, from pytest's report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    reasons: dict[str, int] = {}
    if not path.is_file():
        return {**counts, "failures": failures, "skip_reasons": reasons}
    for case in ElementTree.parse(path).iter("testcase"):
        skip = case.find("skipped")
        bad = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if bad is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('name')}: {' '.join(str(bad.get('message')).split())[:300]}")
        elif skip is not None:
            counts["skipped"] += 1
            reason = str(skip.get("message"))
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skip_reasons": reasons}


def sanitize(sanitizer: str | None) -> dict[str, Any]:
    """Runs every small case under every tool. Any finding is an error."""
    if sanitizer is None:
        fix = "install the CUDA toolkit's compute-sanitizer and put it on PATH"
        raise MachineError("E1101", WHERE, "compute-sanitizer is missing", fix)
    require_built(PROGRAM)
    rows = []
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        case, out = Path(folder, "case.safetensors"), Path(folder, "out.bin")
        for row in sanitizer_rows():
            write_case(row, case)
            for tool in TOOLS:
                command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), str(PROGRAM), str(case), str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                summary = [line.lstrip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
                if done.returncode:
                    said = "; ".join(summary) or " ".join((done.stdout + done.stderr).split())[-400:]
                    raise TitansError("E1106", WHERE, f"{tool} failed in {row.name}: {said}", "correct the kernel")
                rows.append({"name": row.name, "tool": tool, "summary": "; ".join(summary)})
    return {"rows": rows}


def try_runtimes(bundle: Path, tokens: int = 2000) -> dict[str, Any]:
    """Runs the bundle on every vendor library that loads here: golden logits, a stream, and its speed."""
    from benchmarks import gpu_device

    found: dict[str, Any] = {}
    for backend in ("onnxruntime", "tensorrt_rtx", "tensorrt"):
        try:
            found[backend] = {"status": "done", **gpu_device.run_bundle(bundle, backend, tokens)}
        except TitansError as error:
            found[backend] = {"status": "not run" if error.exit_code == 4 else "failed", "reason": str(error)}
    return {"bundle": bundle.name, "runtimes": found}


def device_of() -> dict[str, Any]:
    """The device as the kernel reports it, which proves that the kernel runs here."""
    require_built(PROGRAM)
    done = subprocess.run([str(PROGRAM), "--device"], capture_output=True, text=True, check=False)
    if done.returncode:
        problem = f"the kernel finds no GPU: {done.stderr.strip()}"
        raise TitansError("E0910", WHERE, problem, "check the driver with nvidia-smi")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def require_built(program: Path) -> None:
    if not program.is_file():
        raise MachineError("E0908", WHERE, f"the program {program.name} is missing", "run --part build first")


def compile_with(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = next((line for line in lines if "error" in line.lower()), "")
        print("\n".join(lines[-_LAST_LINES:]), file=sys.stderr)
        raise TitansError("E1104", WHERE, f"{' '.join(command[:2])} failed: {said or lines[-1]}", "see the lines above")
