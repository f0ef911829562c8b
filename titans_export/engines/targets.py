"""The table of devices that engines can be built for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

TENSORRT, RTX, ORT = "tensorrt", "tensorrt_rtx", "onnxruntime"
FP32, FP16, BF16 = "fp32", "fp16", "bf16"
X86, ARM = "linux-x86_64", "linux-aarch64"
FP8_FROM = 89  # the first compute capability with e4m3 matmuls

_LOW = (FP32, FP16, BF16)


@dataclass(frozen=True)
class Target:
    """A device. memory_gib: the smallest memory of devices with this name."""

    name: str
    device: str
    sm: int | None
    memory_gib: int
    platform: str
    compilers: tuple[str, ...]  # in order of preference
    precisions: tuple[str, ...] = _LOW
    shared_memory: bool = False  # the CPU and the GPU share one memory
    tensorrt: tuple[int, int] = (10, 3)  # the first release of full TensorRT that this project supports on it
    system: str = ""

    @property
    def gpu(self) -> bool:
        """Whether the target is a GPU."""
        return self.sm is not None

    @property
    def memory(self) -> int:
        """The device's memory in bytes."""
        return self.memory_gib << 30


_JETPACK6, _JETPACK7 = "JetPack 6.1, CUDA 12.6, TensorRT 10.3", "JetPack 7.0, CUDA 13.0, TensorRT 10.13"
_GEFORCE = (RTX, TENSORRT, ORT)
_ANY = (TENSORRT, RTX, ORT)
_SERVER = (TENSORRT, ORT)
_BLACKWELL = (10, 8)

TARGETS = {
    target.name: target
    for target in (
        Target("orin-nano", "Jetson Orin Nano", 87, 8, ARM, (TENSORRT,), shared_memory=True, system=_JETPACK6),
        Target("orin-agx", "Jetson AGX Orin", 87, 32, ARM, (TENSORRT,), shared_memory=True, system=_JETPACK6),
        Target(
            "thor", "Jetson AGX Thor", 110, 128, ARM, (TENSORRT,),
            shared_memory=True, tensorrt=(10, 13), system=_JETPACK7,
        ),
        Target(
            "dgx-spark", "DGX Spark", 121, 128, ARM, _GEFORCE,
            shared_memory=True, tensorrt=(10, 14), system="CUDA 13, TensorRT 10.14 or TensorRT-RTX 1.7",
        ),
        Target("rtx-30", "GeForce RTX 30", 86, 8, X86, _GEFORCE, system="TensorRT-RTX 1.7"),
        Target("rtx-40", "GeForce RTX 40", 89, 8, X86, _GEFORCE, system="TensorRT-RTX 1.7"),
        Target("rtx-50", "GeForce RTX 50", 120, 8, X86, _GEFORCE, tensorrt=_BLACKWELL, system="TensorRT-RTX 1.7"),
        Target("a100", "A100", 80, 40, X86, _ANY, system="TensorRT 10.3"),
        Target("l4", "L4", 89, 24, X86, _ANY, system="TensorRT 10.3"),
        Target("l40s", "L40S", 89, 48, X86, _ANY, system="TensorRT 10.3"),
        Target("h100", "H100", 90, 80, X86, _SERVER, system="TensorRT 10.3"),
        Target("h200", "H200", 90, 141, X86, _SERVER, system="TensorRT 10.3"),
        Target("b200", "B200", 100, 180, X86, _SERVER, tensorrt=_BLACKWELL, system="CUDA 12.8, TensorRT 10.8"),
        Target("cpu", "any CPU", None, 2, "any", (ORT,), (FP32,), shared_memory=True, system="ONNX Runtime 1.21"),
    )
}  # fmt: skip


def find_target(name: str) -> Target:
    """The target of that name. Raises UsageError."""
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        problem = f"unknown target: expected one of {known}, got {name}"
        raise UsageError("E0104", "build", problem, "see titans-export build --list-targets")
    return TARGETS[name]
