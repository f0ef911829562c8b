"""Runs the bare CUDA kernels of operators without a packed row, through `node_run_cuda`, on a GPU or emulated."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_runner import CUDA, CUDA_EMULATED, EMULATED_GPUS, Target, cuda_targets
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
EMULATED = CUDA_EMULATED.with_name("node_run_cuda_emulated")
emulated = pytest.mark.skipif(not EMULATED.exists(), reason=f"no {EMULATED}: make kernels")


def node_targets() -> list[Any]:
    """As `cuda_targets`, for operators that need no more shared memory than every GPU has."""
    params: list[Any] = []
    given: list[Any] = cuda_targets()
    for param in given:
        [target] = param.values
        if target.name == "small":
            continue
        program = EMULATED if target.environment else CUDA.with_name("node_run_cuda")
        named = Target(target.name, (str(program),), environment=target.environment, cuda=True)
        params.append(pytest.param(named, id=param.id, marks=param.marks))
    return params


def emulated_node(order: str, gpu: str = EMULATED_GPUS["orin"][0]) -> Target:
    environment = (("TITANS_EMULATED_GPU", gpu), ("TITANS_EMULATED_ORDER", order))
    return Target("emulated", (str(EMULATED),), environment=environment, cuda=True)


def run_cuda_node(
    target: Target,
    folder: Path,
    operator: str,
    attributes: dict[str, Any],
    feeds: dict[str, Array],
    shapes: list[tuple[int, ...]],
    in_place: bool = False,
) -> tuple[list[Array], str]:
    """The outputs, which have these shapes, and the error that the device reports, or "".

    Raises RuntimeError with the program's message.
    """
    case, out = folder / "case.safetensors", folder / "out.bin"
    metadata = {"calls": "1", "operator": operator, "attributes": json.dumps(attributes)}
    save_file({name: np.ascontiguousarray(x) for name, x in feeds.items()}, case, metadata=metadata)
    command = [*target.command, str(case), str(out), *(["--in-place"] if in_place else [])]
    environment = os.environ | dict(target.environment)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    raw, outputs, begin = np.fromfile(out, np.float32), [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        outputs.append(raw[begin : begin + size].reshape(shape))
        begin += size
    assert begin == raw.size
    return outputs, json.loads(done.stdout)["status"]
