"""Builds the plugin and the engines with this machine's TensorRT, runs them, and writes one JSON file.

    tools/device_check BUNDLE --target orin-agx -o orin.json
    tools/device_check BUNDLE --target orin-agx -o orin.json --part engines --precision fp16

Parts: build (runtime, kernel and plugin), engines (one per way of keeping the memory in one buffer), run (golden logits
of the saved engines, a long stream compared with the CPU, times with the power mode). Needs TensorRT with its Python
module and headers, the CUDA toolkit, CMake and the titans-export package; the images of tools/docker contain them.
Exit codes: 0 done, 1 failed, 2 usage, 3 logits differ, 4 a requirement is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_machine
from benchmarks.gpu_report import DONE, FAILED, Report, failed_parts
from titans_export.errors import MachineError, TitansError

WHAT = "device_check"
ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "device"
PARTS = ("build", "engines", "run")
ALIASES = ("declared", "undeclared", "two-buffers")
Arguments = argparse.Namespace


def find_tensorrt(load: Callable[[str], Any] = importlib.import_module) -> str:
    """The installed version of TensorRT. Raises MachineError."""
    try:
        version: str = load("tensorrt").__version__
    except ImportError as error:
        fix = "run this on the device itself, or in the image of tools/docker that fits it"
        raise MachineError("E1101", WHAT, f"cannot import TensorRT's Python module: {error}", fix) from None
    return version


def find_device() -> dict[str, Any]:
    """The GPU, as the driver reports it, because nvidia-smi does not work on a Jetson."""
    from titans_export.engines.machine import this_machine

    machine = this_machine()
    if not machine.gpus:
        raise MachineError("E0910", WHAT, "the driver lists no NVIDIA GPU", "run this on the device itself")
    gpu = machine.gpus[0]
    model = Path("/proc/device-tree/model")
    board = model.read_text(errors="replace").strip("\0\n ") if model.is_file() else None
    return {"name": gpu.name, "sm": gpu.sm, "driver": machine.driver, "platform": machine.platform, "board": board}


def _build(report: Report, arguments: Arguments) -> None:
    from benchmarks.gpu_parts import architecture, compile_with

    _needs_cmake()
    sm = find_device()["sm"]
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", "-DTITANS_CUDA=ON",
        f"-DTITANS_CUDA_ARCHITECTURES={architecture(sm)}", "-DTITANS_CUDA_PTX=OFF",
    ]  # fmt: skip
    if arguments.tensorrt_root:
        configure.append(f"-DTENSORRT_ROOT={arguments.tensorrt_root}")
    compile_with(configure)
    compile_with(["cmake", "--build", str(BUILD), "-j", str(arguments.jobs)])
    made = sorted(path.name for path in (BUILD / "lib").glob("*.so"))
    if not any(name.startswith("libtitans_tensorrt_plugin") for name in made):
        raise MachineError(
            "E1104", WHAT, f"no plugin library among {', '.join(made)}", "give --tensorrt-root, with include/"
        )
    report.save("build", DONE, libraries=made, architecture=architecture(sm))


def engine_name(arguments: Arguments, alias: str) -> str:
    return f"{arguments.target}-{arguments.precision}-{alias}"


def build_command(arguments: Arguments, alias: str, plugin: Path) -> list[str]:
    """The command that builds an engine beside the bundle's existing ones."""
    return [
        sys.executable, "-m", "titans_export.cli", "build", str(arguments.bundle), "--target", arguments.target,
        "--compiler", "tensorrt", "--precision", arguments.precision, "--alias", alias,
        "--name", engine_name(arguments, alias), "--plugin-library", str(plugin), "--overwrite",
    ]  # fmt: skip


def _engines(report: Report, arguments: Arguments) -> None:
    """Builds the engines. A failed build is a result, as long as one build succeeds."""
    plugins = sorted((BUILD / "lib").glob("libtitans_tensorrt_plugin_*.so"))
    if not plugins:
        raise MachineError("E0908", WHAT, f"no plugin library in {BUILD / 'lib'}", "run --part build first")
    found: dict[str, Any] = {}
    for alias in ALIASES:
        done = subprocess.run(build_command(arguments, alias, plugins[-1]), capture_output=True, text=True, cwd=ROOT)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing said"]
        found[alias] = {"status": FAILED if done.returncode else DONE, "said": lines[-1]}
    built = [alias for alias, engine in found.items() if engine["status"] == DONE]
    if not built:
        raise TitansError(
            "E1106", WHAT, f"no engine was built: {next(iter(found.values()))['said']}", "see that message"
        )
    report.save("engines", DONE, precision=arguments.precision, tensorrt=find_tensorrt(), engines=found)


def _run(report: Report, arguments: Arguments) -> None:
    """Runs the checks in this process, with the libraries that were built here."""
    library = BUILD / "lib" / "libtitans.so"
    if not library.is_file():
        raise MachineError("E0908", WHAT, f"{library.name} is missing", "run --part build first")
    os.environ["TITANS_LIBRARY"] = str(library)
    sys.path.insert(0, str(ROOT / "runtime" / "python"))
    from benchmarks import gpu_device

    engines = report.part("engines").get("engines", {})
    found: dict[str, Any] = {}
    worst = 0
    for alias in (alias for alias in ALIASES if engines.get(alias, {}).get("status") == DONE):
        entry: dict[str, Any] = {}
        try:
            with gpu_device.power(entry):
                entry |= gpu_device.run_bundle(
                    arguments.bundle, "tensorrt", arguments.tokens, engine_name(arguments, alias)
                )
            entry["status"] = DONE
        except TitansError as error:
            entry |= {"status": FAILED, "reason": str(error)}
            worst = max(worst, error.exit_code)
        found[alias] = entry
    if not found:
        raise MachineError("E0908", WHAT, "no engine was built", "run --part engines first")
    report.save("run", FAILED if worst else DONE, tokens=arguments.tokens, engines=found)
    if worst:
        bad = "; ".join(entry["reason"] for entry in found.values() if entry["status"] == FAILED)
        raise TitansError("E1106", WHAT, f"engines failed: {bad}", "see that message")


RUN: dict[str, Callable[[Report, Arguments], None]] = {"build": _build, "engines": _engines, "run": _run}


def _needs_cmake() -> None:
    if shutil.which("cmake") is None:
        raise MachineError("E1101", WHAT, "cmake is not on PATH", "pip install cmake ninja")


def parse(arguments: Sequence[str] | None) -> Arguments:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        WHAT, description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", required=True, help="a target of titans-export build --list-targets")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write or extend")
    parser.add_argument("--part", action="append", choices=PARTS, help="run only this part; repeatable")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the long stream (default 100000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel compiles")
    root = os.environ.get("TENSORRT_ROOT")
    parser.add_argument("--tensorrt-root", default=root, help="folder that contains TensorRT's include/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        from titans_export.engines.targets import find_target

        find_target(chosen.target)
        version = find_tensorrt()
        description = gpu_machine.describe(find_device(), gpu_machine.find_toolkit())
        report = Report(chosen.output, WHAT, {**description, "target": chosen.target, "tensorrt": version})
    except TitansError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    codes = []
    for part in chosen.part or PARTS:
        print(f"{WHAT}: part {part}", file=sys.stderr, flush=True)
        try:
            with report.running(part):
                RUN[part](report, chosen)
        except TitansError as error:
            print(error, file=sys.stderr)
            codes.append(error.exit_code)
    print(f"{WHAT}: {chosen.output}: " + ", ".join(f"{n} {p['status']}" for n, p in report.parts.items()))
    if failed_parts(report.parts) or 1 in codes:
        return 1
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
