"""TensorRT-RTX: standard operators only, two buffers per state, built ahead of time without a GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

from ..errors import MachineError
from .machine import Machine
from .targets import Target

LEAST = (1, 7)
CAPABILITIES = (80, 86, 89, 120, 121)  # supported here; the vendor supports more


def find() -> Any:
    """The vendor's module. Raises MachineError if it is missing or too old."""
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        raise MachineError(
            "E1006", "build", f"cannot import tensorrt_rtx: {error}", "pip install 'titans-export[rtx]'"
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < LEAST:
        least = ".".join(map(str, LEAST))
        problem = f"unsupported TensorRT-RTX: expected {least} or newer, got {trt.__version__}"
        raise MachineError("E0653", "build", problem, "pip install -U tensorrt-rtx")
    return trt


def check_target(target: Target) -> None:
    """Raises MachineError for a target that TensorRT-RTX does not support."""
    if target.sm not in CAPABILITIES:
        raise MachineError(
            "E0655",
            "build",
            f"unsupported target for TensorRT-RTX: expected {', '.join(f'sm_{sm}' for sm in CAPABILITIES)}, "
            f"got {f'{target.name} (sm_{target.sm})' if target.gpu else target.name}",
            f"give --compiler {target.compilers[0]}",
        )


def check_machine(target: Target, machine: Machine) -> None:
    """Raises MachineError unless the platform is the target's, because engines run on the platform of their build."""
    if machine.platform != target.platform:
        raise MachineError(
            "E0654",
            "build",
            f"TensorRT-RTX builds for its own platform only: expected {target.platform} for {target.name}, "
            f"got {machine.platform}",
            f"run this command on the {target.device}, or on any {target.platform} machine",
        )


def cuda_major() -> int:
    """The CUDA version of the installed libraries, which the device's driver must support."""
    for distribution in importlib.metadata.distributions():
        if match := re.fullmatch(r"tensorrt[_-]rtx[_-]cu(\d+)", distribution.metadata["Name"] or ""):
            return int(match[1])
    return 12
