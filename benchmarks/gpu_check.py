"""Builds, tests, sanitizes and times the CUDA kernel on this machine's NVIDIA GPU, and writes one JSON file.

    tools/gpu_check -o gpu.json                                everything
    tools/gpu_check -o gpu.json --part time                    one part; the others keep their results
    tools/gpu_check -o gpu.json --part time --seconds 540      in pieces: finished rows are not measured again

Parts: build, test, plugin (with TensorRT's headers), sanitize, time, engines. Needs a GPU with its driver, the CUDA
toolkit, CMake, the headers of tools/fetch_deps, PyTorch with CUDA, numpy, safetensors and pytest. Exit codes: 0 done,
1 failed, 2 usage, 4 a requirement is missing. The JSON lists skipped work with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_machine
from benchmarks.gpu_report import DONE, NOT_RUN, PARTIAL, Report, failed_parts
from titans_export.errors import MachineError, TitansError

WHAT = "gpu_check"
PARTS = ("build", "test", "plugin", "sanitize", "time", "engines")
Arguments = argparse.Namespace


def _build(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    from benchmarks import gpu_parts

    toolkit = machine["toolkit"]
    built = gpu_parts.build(machine["gpu"]["sm"], toolkit["nvcc"], arguments.jobs, arguments.tensorrt_root)
    report.save("build", DONE, **built, kernel_device=gpu_parts.device_of())


def _test(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    from benchmarks import gpu_parts

    report.save("test", DONE, **gpu_parts.test(arguments.seconds))


def _plugin(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    from benchmarks import gpu_parts

    report.save("plugin", DONE, **gpu_parts.test_plugin(arguments.tensorrt_root))


def _sanitize(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    from benchmarks import gpu_parts

    report.save("sanitize", DONE, **gpu_parts.sanitize(machine["toolkit"].get("compute_sanitizer")))


def _time(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    """Times row by row and saves each row at once. Limits are measured in every run."""
    try:
        import torch
    except ImportError as error:
        problem = f"cannot import PyTorch: {error}"
        raise MachineError("E1101", WHAT, problem, "install torch for this machine's CUDA") from None
    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} has no CUDA"
        raise MachineError("E1101", WHAT, problem, "install torch for this machine's CUDA")
    from benchmarks import gpu_parts, gpu_time
    from benchmarks.gpu_cases import rows

    gpu_parts.device_of()
    end = time.monotonic() + arguments.seconds
    limits = gpu_time.measure_limits()
    found = [] if arguments.again else list(report.part("time").get("rows", []))
    known = {row["name"] for row in found}
    wanted = [row for row in rows() if row.name in arguments.row or not arguments.row]
    content = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "limits": limits}
    for index, row in enumerate(row for row in wanted if row.name not in known):
        left = end - time.monotonic()
        if index and left < arguments.row_seconds:
            break
        say(f"time: {row.name}")
        until = time.monotonic() + min(arguments.row_seconds, left) / 2
        found.append({**gpu_time.time_row(row, gpu_parts.PROGRAM, limits, until), "limits": limits})
        report.save("time", PARTIAL, **content, rows=found)
    missing = [row.name for row in wanted if row.name not in {measured["name"] for measured in found}]
    wrong = [f"{m['name']}: {c['name']}" for m in found for c in m["baselines"] if c["passed"] is False]
    report.save("time", PARTIAL if missing else DONE, **content, rows=found, not_yet_measured=missing, wrong=wrong)
    ours = [name for name in wrong if ": kernel" in name]
    if ours:
        raise TitansError("E1106", WHAT, f"the kernel is incorrect in {'; '.join(ours)}", "run --part test")


def _engines(report: Report, machine: dict[str, Any], arguments: Arguments) -> None:
    from benchmarks import gpu_parts

    bundle = arguments.bundle
    if not bundle.is_dir():
        fix = "run titans-export export examples/checkpoints/mac-bytes -o " + str(bundle)
        raise MachineError("E0201", WHAT, f"no bundle: {bundle}", fix)
    found = gpu_parts.try_runtimes(bundle)
    ran = any(runtime["status"] == "done" for runtime in found["runtimes"].values())
    report.save("engines", DONE if ran else NOT_RUN, **found)


RUN: dict[str, Callable[[Report, dict[str, Any], Arguments], None]] = {
    "build": _build,
    "test": _test,
    "plugin": _plugin,
    "sanitize": _sanitize,
    "time": _time,
    "engines": _engines,
}


def parse(arguments: Sequence[str] | None) -> Arguments:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        WHAT, description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write or extend")
    parser.add_argument("--part", action="append", choices=PARTS, help="run only this part; repeatable")
    parser.add_argument("--row", action="append", default=[], help="time: measure only this row; repeatable")
    parser.add_argument("--again", action="store_true", help="time: measure finished rows again")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time limit of a part (default 3600)")
    parser.add_argument("--row-seconds", type=float, default=240.0, help="time: time limit of a row (default 240)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="build: parallel compiles")
    parser.add_argument(
        "--tensorrt-root", default=os.environ.get("TENSORRT_ROOT"), help="folder that contains TensorRT's include/"
    )
    parser.add_argument(
        "--bundle", type=Path, default=Path("build/test/mac-bytes.titans"), help="engines: bundles to run"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        gpu = gpu_machine.find_gpu()
        toolkit = gpu_machine.find_toolkit()
        machine = {"gpu": gpu, "toolkit": toolkit}
        report = Report(chosen.output, WHAT, gpu_machine.describe(gpu, toolkit))
    except TitansError as error:
        say(str(error))
        return error.exit_code
    codes = []
    for part in chosen.part or PARTS:
        say(f"part {part}")
        try:
            with report.running(part):
                RUN[part](report, machine, chosen)
        except TitansError as error:
            say(str(error))
            codes.append(error.exit_code)
    say(f"{chosen.output}: " + ", ".join(f"{name} {part['status']}" for name, part in report.parts.items()))
    if failed_parts(report.parts) or 1 in codes:
        return 1
    return max(codes, default=0)


def say(text: str) -> None:
    print(f"{WHAT}: {text}" if not text.startswith("[") else text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
