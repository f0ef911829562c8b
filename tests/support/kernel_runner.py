"""Runs the bare kernels through `neural_memory_run` and `neural_memory_run_cuda`.

The CPU's for each instruction set, natively and emulated for aarch64; CUDA's on a GPU where there is one, and
everywhere emulated thread by thread (tests/cuda_emulation) as GPUs of several kinds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation import BUILD as BUILD_AARCH64
from emulation import EMULATOR
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes
from titans_export.operators import CHUNK_NEURAL_MEMORY, NEURAL_MEMORY, Operator

ROOT = Path(__file__).resolve().parents[2]
NATIVE = [str(ROOT / "build" / "runtime" / "bin" / "neural_memory_run")]
EMULATED = [*EMULATOR, str(BUILD_AARCH64 / "bin" / "neural_memory_run")]

# Every instruction set that there is code for, and who may run it.
TARGETS = {"avx512": [NATIVE], "avx2": [NATIVE], "neon": [NATIVE, EMULATED], "plain": [NATIVE, EMULATED]}

# tools/gpu_check names one that it has built for this GPU alone.
# Each is a build for other GPUs: all, those of `make test`, and those that only `make test-all` adds.
CUDA_BUILDS = {name: ROOT / "build" / name for name in ("cuda", "cuda-two", "cuda-rest")}
_CUDA_RUNNERS = [build / "bin" / "neural_memory_run_cuda" for build in CUDA_BUILDS.values()]
CUDA = Path(
    os.environ.get("TITANS_CUDA_RUNNER", next((path for path in _CUDA_RUNNERS if path.exists()), _CUDA_RUNNERS[0]))
)
CUDA_EMULATED = ROOT / "build" / "emulation" / "bin" / "neural_memory_run_cuda_emulated"
# Compute capability, multiprocessors and bytes of shared memory of a block; and which thread runs first. Between them
# they meet every placement: clusters, counters in global memory, W and S in the workspace.
EMULATED_GPUS = {
    "h100": ("90:132:232448", "forward"),
    "orin": ("87:8:166912", "reverse"),
    "small": ("120:84:16384", "17"),
}


@dataclass(frozen=True)
class Target:
    name: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    cuda: bool = False

    @property
    def tolerance(self) -> float:
        return TOLERANCES["cuda-kernel" if self.cuda else "cpu-kernel", "float32"]

    @property
    def harmless_options(self) -> tuple[tuple[str, ...], ...]:
        """Options of the program that must not change a bit."""
        if self.cuda:
            return ("--two-buffers",), ("--misaligned",), ("--two-buffers", "--misaligned")
        return ("--threads", "3"), ("--two-buffers",), ("--threads", "2", "--two-buffers")


@lru_cache
def _listed(command: tuple[str, ...]) -> str:
    """Names of the targets that a program has, or why it cannot be asked."""
    if shutil.which(command[0]) is None or not Path(command[-1]).exists():
        return f"!no {command[-1]} or {command[0]}: make kernels"
    return subprocess.run([*command, "--list-targets"], capture_output=True, text=True, check=True).stdout


def cpu_targets() -> list[pytest.param]:
    """A parameter for each instruction set and way to run it; skipped, with the reason, where this machine cannot."""
    params = []
    for name, commands in TARGETS.items():
        for command in commands:
            listed = _listed(tuple(command))
            emulated = command is EMULATED
            if not listed.startswith("!") and name not in listed.split():
                # An x86-64 program has no NEON; that is no gap as long as the emulated one is there.
                if emulated or name == "neon":
                    continue
                listed = f"!this processor has no {name}"
            marks = [pytest.mark.skip(reason=listed[1:])] if listed.startswith("!") else []
            if emulated:  # what it runs is built for `make test-rest`
                marks.append(pytest.mark.long)
            label = f"{name}-emulated" if emulated else name
            target = Target(name, tuple(command), ("--target", name))
            params.append(pytest.param(target, id=label, marks=marks))
    return params


def _why_no_gpu() -> str:
    if not CUDA.exists():
        return f"no {CUDA}: make cuda"
    done = subprocess.run([str(CUDA), "--device"], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip()


def cuda_targets(few: bool = False) -> list[pytest.param]:
    """The GPU of this machine and the emulated ones; skipped, with the reason, where they are missing.

    few: only long runs have more than one emulated GPU, that on which hardly anything fits into shared memory.
    """
    why = _why_no_gpu()
    marks = [pytest.mark.skip(reason=why)] if why else []
    params = [pytest.param(Target("gpu", (str(CUDA),), cuda=True), id="cuda-gpu", marks=marks)]
    missing = "" if CUDA_EMULATED.exists() else f"no {CUDA_EMULATED}: needs CUDA's headers and Boost.Context"
    marks = [pytest.mark.skip(reason=missing)] if missing else []
    for name, (gpu, order) in EMULATED_GPUS.items():
        environment = (("TITANS_EMULATED_GPU", gpu), ("TITANS_EMULATED_ORDER", order))
        target = Target(name, (str(CUDA_EMULATED),), environment=environment, cuda=True)
        also = [pytest.mark.long] if few and name != "small" else []
        params.append(pytest.param(target, id=f"cuda-emulated-{name}", marks=[*marks, *also]))
    return params


targets = pytest.mark.parametrize("target", [*cpu_targets(), *cuda_targets()])


def operator_of(node: dict[str, Any]) -> Operator:
    """The operator of a node with these attributes: only NeuralMemory has a mode."""
    return NEURAL_MEMORY if "mode" in node else CHUNK_NEURAL_MEMORY


@dataclass
class Result:
    y: list[Tensor]  # of each call, (B, H, T, D)
    stats: list[Tensor]  # of each update, (B, H, 4)
    state: Tensor  # (P, H, R)
    report: str  # what the program printed
    initial_weights: list[Tensor]  # of each call of ChunkNeuralMemory with --initial-weights, (B, H, N, |W|)


def run_kernel(
    target: Target,
    folder: Path,
    spec: MemorySpec,
    state: Tensor,
    calls: list[dict[str, Tensor]],
    mode: str = "update",
    aligned: bool = False,
    memory_dtype: str = "float32",
    options: tuple[str, ...] = (),
    values: torch.dtype = torch.float32,
) -> Result:
    """The results of the calls, the state going from one to the next. Operands are named as in docs/operator.md.

    `values` is the type of q, k and v, and inside of y; all other numbers are float32.
    """
    node = {**attributes(spec, mode, aligned), "memory_dtype": memory_dtype}
    return run_node(target, folder, node, state, calls, options, values)


def run_node(
    target: Target,
    folder: Path,
    node: dict[str, Any],
    state: Tensor,
    calls: list[dict[str, Tensor]],
    options: tuple[str, ...] = (),
    values: torch.dtype = torch.float32,
) -> Result:
    """As `run_kernel`, for a node with these attributes of the operator that has them all."""
    operator = operator_of(node)
    tensors = {"state": state.float()}
    for index, call in enumerate(calls):
        for name, value in call.items():
            wanted = values if name in ("q", "k", "v") else torch.float32
            tensors[f"{index}.{name}"] = value.to(wanted) if value.is_floating_point() else value
    case, out = folder / "case.safetensors", folder / "out.bin"
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        case,
        metadata={"calls": str(len(calls)), "operator": operator.name, "attributes": json.dumps(node)},
    )
    done = subprocess.run(
        [*target.command, str(case), str(out), *target.options, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **dict(target.environment)},
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    raw = torch.from_numpy(np.fromfile(out, np.float32))
    y, stats, initial_weights, at = [], [], [], 0
    chunk, layers = node["chunk_size"], list(pairwise(node["widths"]))
    weights = sum(a * b for a, b in layers) + (layers[0][0] if node.get("norm_weight") == "fast" else 0)

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return raw[at - size : at].reshape(shape)

    for call in calls:
        shape = tuple(call["q"].shape)
        y.append(take(*shape))
        if node.get("mode") != "read":
            stats.append(take(*shape[:2], 4))
        if "--initial-weights" in options:
            initial_weights.append(take(*shape[:2], -(-shape[2] // chunk), weights))
    result = Result(y, stats, take(*state.shape), done.stdout, initial_weights)
    assert at == raw.numel()
    return result
