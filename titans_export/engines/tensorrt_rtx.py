"""TensorRT-RTX: standard operators alone, two buffers for every state, built ahead of time without a GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

from ..errors import MachineError
from .machine import Machine
from .targets import Target

LEAST = (1, 7)
CAPABILITIES = (80, 86, 89, 120, 121)  # that this project builds for, of what the vendor lists


def find() -> Any:
    """The vendor's module. Raises MachineError where it is missing or too old."""
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        raise MachineError(
            "build", "the Python package tensorrt_rtx", str(error), "pip install 'titans-export[rtx]'"
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < LEAST:
        least = ".".join(map(str, LEAST))
        raise MachineError("build", f"TensorRT-RTX {least} or newer", trt.__version__, "pip install -U tensorrt-rtx")
    return trt


def check_target(target: Target) -> None:
    """Refuses what TensorRT-RTX does not build for. Raises MachineError."""
    if target.sm not in CAPABILITIES:
        raise MachineError(
            "build",
            f"a target of {', '.join(f'sm_{sm}' for sm in CAPABILITIES)} for TensorRT-RTX",
            f"{target.name} (sm_{target.sm})" if target.gpu else target.name,
            f"take --compiler {target.compilers[0]}",
        )


def check_machine(target: Target, machine: Machine) -> None:
    """Refuses another platform than the target's: engines run on the kind they were built on. Raises MachineError."""
    if machine.platform != target.platform:
        raise MachineError(
            "build",
            f"{target.platform} for {target.name}, as TensorRT-RTX engines run on the platform they were built on",
            machine.platform,
            f"run this command on the {target.device}, or on any {target.platform} machine",
        )


def cuda_major() -> int:
    """The CUDA of the installed libraries, which the driver of the device must take."""
    for distribution in importlib.metadata.distributions():
        if match := re.fullmatch(r"tensorrt[_-]rtx[_-]cu(\d+)", distribution.metadata["Name"] or ""):
            return int(match[1])
    return 12
