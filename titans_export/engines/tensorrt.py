"""Full TensorRT: the memory is our plugin, and the device itself builds, since the builder times kernels on it."""

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
    """The vendor's module. Raises MachineError where it is missing or of a release that this project does not take."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MachineError(
            "build",
            "TensorRT's Python package",
            str(error),
            "install TensorRT (JetPack brings it: apt install python3-libnvinfer; elsewhere pip install tensorrt)",
        ) from None


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check(trt: Any, target: Target) -> None:
    """Refuses a release that does not serve the target. Raises MachineError."""
    least = target.tensorrt
    found = release(trt.__version__)
    if found < least or found[0] > NEWEST:
        expected = f"TensorRT from {least[0]}.{least[1]} to {NEWEST}.x for {target.name}"
        raise MachineError("build", expected, trt.__version__, "install one of these")


def check_machine(target: Target, machine: Machine) -> None:
    """Refuses to build where the target is not. Raises MachineError."""
    gpu = machine.find(target.sm or 0)
    if gpu is not None and machine.platform == target.platform:
        return
    own = f"a GPU of sm_{machine.gpus[0].sm} ({machine.gpus[0].name})" if machine.gpus else "no NVIDIA GPU"
    other = (
        ", or take --compiler tensorrt_rtx, which builds without a GPU" if "tensorrt_rtx" in target.compilers else ""
    )
    raise MachineError(
        "build",
        f"{target.platform} with a GPU of sm_{target.sm}, since TensorRT builds on the device it builds for",
        f"{machine.platform} with {own}",
        f"run this command on the {target.device} ({target.system}), or tools/device_check there, or take the prepared "
        f"graphs and the lines of --emit-trtexec -o DIR to it{other}",
    )


def plugin_library(given: Path | None, major: int) -> Path:
    """The library with our plugin: what was given, what the environment names, or what lies beside the runtime."""
    if given is None and ENVIRONMENT in os.environ:
        given = Path(os.environ[ENVIRONMENT])
    name = library_name(major)
    if given is None:
        given = _beside_the_runtime(name)
    if given is None or not given.is_file():
        raise MachineError(
            "plugin library",
            f"our plugin for TensorRT {major}, {name}",
            f"none at {given}" if given else "none",
            "build it (docs/tensorrt-plugin.md) and give --plugin-library PATH",
        )
    return given.resolve()


def library_name(major: int) -> str:
    """One library for each major version, as no binary compatibility is promised across them."""
    return f"libtitans_tensorrt_plugin_{major}.so"


def _beside_the_runtime(name: str) -> Path | None:
    try:
        from titans_runtime._library import _library_path
    except ImportError:
        return None
    path = Path(_library_path()).with_name(name)
    return path if path.is_file() else None
