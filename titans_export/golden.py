"""Golden data: inputs of one stream and the right outputs, kept in the bundle so that `verify` needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import manifest as records
from .bundle import GOLDEN
from .model import StreamModel
from .safetensors_file import write_safetensors

GOLDEN_GRID = 2.0**-16  # golden logits are rounded to this, which hides small differences between machines
GOLDEN_FLOATS = 1 << 19  # most golden logits


class Golden(NamedTuple):
    """Inputs (1, T, ...) of one stream, outputs (T, size) of float64 PyTorch, and the tolerance of the outputs."""

    inputs: torch.Tensor
    outputs: NDArray[Any]
    tolerance: float


def _sample_numbers(count: int) -> list[int]:
    """Pseudorandom numbers below 2^31, equal on every machine: the high bits of a linear congruential generator."""
    values, x = [], 1
    for _ in range(count):
        x = x * 6364136223846793005 + 1442695040888963407 & 0xFFFFFFFFFFFFFFFF
        values.append(x >> 33)
    return values


def sample_inputs(model: StreamModel, count: int) -> torch.Tensor:
    """(1, count) token ids, or (1, count, size) vectors of about unit variance, equal on every machine."""
    size = model.input.size
    if model.input.kind == "tokens":
        return torch.tensor([[value % size for value in _sample_numbers(count)]])
    values = torch.tensor(_sample_numbers(count * size), dtype=torch.float64).reshape(1, count, size)
    # Uniform in [-sqrt(3), sqrt(3)] has variance 1. Multiples of 2^-16 are exact in float32.
    return (((values / 2**31 * 2 - 1) * 3**0.5 * 2**16).round() / 2**16).float()


def kept_positions(model: StreamModel) -> int:
    """Most positions that the golden data of this model have."""
    return max(GOLDEN_FLOATS // max(model.output.size, model.input.size), 2)


def write_golden(folder: Path, model: StreamModel, golden: Golden) -> records.Golden:
    """Writes the golden data into the bundle's folder and returns their entry in the manifest."""
    grid = (np.round(golden.outputs / GOLDEN_GRID) * GOLDEN_GRID).astype(np.float32)
    given, got = model.input, model.output
    dtype = np.int32 if given.kind == "tokens" else np.float32
    write_safetensors(folder / GOLDEN, {given.name: golden.inputs[0].numpy().astype(dtype), got.name: grid})
    if given.kind == "tokens":
        return records.Golden(file=GOLDEN, tokens=given.name, logits=got.name, tolerance=golden.tolerance)
    return records.Golden(file=GOLDEN, vectors=given.name, outputs=got.name, tolerance=golden.tolerance)
