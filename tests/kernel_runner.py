"""Runs the bare kernel through `neural_memory_run`, natively for each instruction set, emulated for aarch64."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from titans_export.model.memory import MemorySpec
from titans_export.model.node import attributes

ROOT = Path(__file__).resolve().parent.parent
NATIVE = [str(ROOT / "build" / "runtime" / "bin" / "neural_memory_run")]
# The neoverse-n1 is emulated many times faster than qemu's default.
EMULATED = ["qemu-aarch64", "-cpu", "neoverse-n1", str(ROOT / "build" / "aarch64" / "bin" / "neural_memory_run")]

# Every instruction set that there is code for, and who may run it.
TARGETS = {"avx512": [NATIVE], "avx2": [NATIVE], "neon": [NATIVE, EMULATED], "plain": [NATIVE, EMULATED]}


@dataclass(frozen=True)
class Target:
    name: str
    command: tuple[str, ...]


@lru_cache
def _listed(command: tuple[str, ...]) -> str:
    """Names of the targets that a program has, or why it cannot be asked."""
    if shutil.which(command[0]) is None or not Path(command[-1]).exists():
        return f"!no {command[-1]} or {command[0]}: make kernels"
    return subprocess.run([*command, "--list-targets"], capture_output=True, text=True, check=True).stdout


def all_targets() -> list[pytest.param]:
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
            label = f"{name}-emulated" if emulated else name
            params.append(pytest.param(Target(name, tuple(command)), id=label, marks=marks))
    return params


targets = pytest.mark.parametrize("target", all_targets())


@dataclass
class Result:
    y: list[Tensor]  # of each call, (B, H, T, D)
    stats: list[Tensor]  # of each update, (B, H, 4)
    state: Tensor  # (P, H, R)


def run_kernel(
    target: Target,
    folder: Path,
    spec: MemorySpec,
    state: Tensor,
    calls: list[dict[str, Tensor]],
    mode: str = "update",
    aligned: bool = False,
    storage: str = "float32",
    options: tuple[str, ...] = (),
) -> Result:
    """The results of the calls, the state going from one to the next. Operands are named as in docs/operator.md."""
    tensors = {"state": state.float()}
    for index, call in enumerate(calls):
        for name, value in call.items():
            tensors[f"{index}.{name}"] = value.float() if value.is_floating_point() else value
    case, out = folder / "case.safetensors", folder / "out.bin"
    node = {**attributes(spec, mode, aligned), "storage": storage}
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        case,
        metadata={"calls": str(len(calls)), "attributes": json.dumps(node)},
    )
    done = subprocess.run(
        [*target.command, str(case), str(out), "--target", target.name, *options], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    raw = torch.from_numpy(np.fromfile(out, np.float32))
    y, stats, at = [], [], 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return raw[at - size : at].reshape(shape)

    for call in calls:
        shape = tuple(call["q"].shape)
        y.append(take(*shape))
        if mode == "update":
            stats.append(take(*shape[:2], 4))
    result = Result(y, stats, take(*state.shape))
    assert at == raw.numel()
    return result
