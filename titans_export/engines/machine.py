"""The platform and GPUs of this machine, as the driver reports them."""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass, field
from functools import lru_cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU in the driver's list."""

    name: str
    sm: int
    memory: int


@dataclass(frozen=True)
class Machine:
    """The machine that builds."""

    platform: str
    gpus: list[Gpu] = field(default_factory=list)
    driver: int | None = None  # the newest CUDA version that the driver supports, such as 12060 for 12.6

    def find(self, sm: int) -> Gpu | None:
        """The first GPU with that compute capability, or None."""
        return next((gpu for gpu in self.gpus if gpu.sm == sm), None)


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """This machine. The list of GPUs is empty without a driver."""
    name = f"{sys.platform}-{platform.machine()}"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        return Machine(name, _gpus(cuda), _driver(cuda))
    except (OSError, AttributeError):
        return Machine(name)


def _driver(cuda: ctypes.CDLL) -> int | None:
    version = ctypes.c_int()
    return version.value if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _gpus(cuda: ctypes.CDLL) -> list[Gpu]:
    count, found = ctypes.c_int(), []
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for number in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        capability = []
        cuda.cuDeviceGet(ctypes.byref(device), number)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        found.append(Gpu(name.value.decode(errors="replace"), capability[0] * 10 + capability[1], memory.value))
    return found
