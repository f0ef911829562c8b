"""Full TensorRT: the memory is our plugin. Builds run on the target itself, because the builder times kernels on it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from ..errors import MachineError
from .machine import Machine
from .targets import Target

NEWEST = 11
ENVIRONMENT = "TITANS_TENSORRT_PLUGIN"


def find() -> Any:
    """The vendor's module. Raises MachineError if it is missing."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MachineError(
            "E1006",
            "build",
            f"cannot import TensorRT's Python package: {error}",
            "install TensorRT (JetPack brings it: apt install python3-libnvinfer; elsewhere pip install tensorrt)",
        ) from None


def release(version: str) -> tuple[int, int]:
    """Major and minor version numbers."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check(trt: Any, target: Target) -> None:
    """Checks that the release supports the target. Raises MachineError."""
    least = target.tensorrt
    found = release(trt.__version__)
    if found < least or found[0] > NEWEST:
        known = f"{least[0]}.{least[1]} to {NEWEST}.x"
        problem = f"unsupported TensorRT for {target.name}: expected {known}, got {trt.__version__}"
        raise MachineError("E0653", "build", problem, "install a version of that range")


def check_machine(target: Target, machine: Machine) -> None:
    """Checks that this machine is the target. Raises MachineError."""
    gpu = machine.find(target.sm or 0)
    if gpu is not None and machine.platform == target.platform:
        return
    own = f"a GPU of sm_{machine.gpus[0].sm} ({machine.gpus[0].name})" if machine.gpus else "no NVIDIA GPU"
    other = (
        ", or take --compiler tensorrt_rtx, which builds without a GPU" if "tensorrt_rtx" in target.compilers else ""
    )
    raise MachineError(
        "E0654",
        "build",
        f"TensorRT builds on the target only: expected {target.platform} with a GPU of sm_{target.sm}, "
        f"got {machine.platform} with {own}",
        f"run this command on the {target.device} ({target.system}), or tools/device_check there, or run the "
        f"trtexec commands of --emit-trtexec -o DIR there{other}",
    )


def plugin_library(given: Path | None, major: int) -> Path:
    """Path of our plugin library: `given`, else the environment's, else the one beside the runtime."""
    if given is None and ENVIRONMENT in os.environ:
        given = Path(os.environ[ENVIRONMENT])
    name = library_name(major)
    if given is None:
        given = _beside_the_runtime(name)
    if given is None or not given.is_file():
        raise MachineError(
            "E0607",
            "plugin library",
            f"no plugin for TensorRT {major}, {name}" + (f", at {given}" if given else ""),
            "build it (docs/tensorrt-plugin.md) and give --plugin-library PATH",
        )
    return given.resolve()


def library_name(major: int) -> str:
    """The library's file name. Each major version has its own, because TensorRT guarantees no ABI across them."""
    return f"libtitans_tensorrt_plugin_{major}.so"


def _beside_the_runtime(name: str) -> Path | None:
    try:
        from titans_runtime._library import _library_path
    except ImportError:
        return None
    path = Path(_library_path()).with_name(name)
    return path if path.is_file() else None
