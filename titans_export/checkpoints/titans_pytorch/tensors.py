"""Checks of the library's tensors: names, shapes, values."""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...named_tensors import NamedTensors
from ..checkpoint import check_values
from .layout import Shapes


def check_layout(shapes: Shapes, expected: Shapes, what: str) -> None:
    """Raises CheckpointError unless the tensors are exactly those of the options, with their shapes."""
    if missing := [name for name in expected if name not in shapes]:
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"missing tensors of a {what} with these options: {', '.join(missing[:3])}",
            "give the state dict of the whole, unchanged module",
        )
    if unknown := sorted(set(shapes) - set(expected)):
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"unknown tensors for a {what} with these options: {', '.join(unknown[:3])}",
            "give an unchanged model of titans-pytorch 0.5",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                "E0304",
                "checkpoint",
                f"wrong shape of tensor {name}: expected {list(shape)}, got {list(shapes[name])}",
                "give an unchanged state dict of titans-pytorch 0.5",
            )


def _is_unused_copy(name: str) -> bool:
    return ".memory_model." in f".{name}"


def checked(tensors: NamedTensors, expected: Shapes) -> NamedTensors:
    """The tensors in float32, checked, in the order of `expected`, without the unused copies in memory_model."""
    check_values(tensors.select({name: name for name in expected}))
    kept = tensors.select({name: name for name in expected if not _is_unused_copy(name)}).float32()
    _check_rotary(kept)
    return kept


def _check_rotary(tensors: NamedTensors) -> None:
    """The rotary frequencies are saved but never trained; half precision rounds them."""
    for name in tensors:
        if name.endswith("rotary_emb.freqs"):
            value = tensors[name]
            exponents = torch.arange(len(value)) / len(value)
            if not torch.allclose(value, 10_000.0**-exponents, rtol=1e-2, atol=1e-6):
                raise CheckpointError(
                    "E0304",
                    "checkpoint",
                    f"tensor {name} differs from the library's rotary frequencies",
                    "give an unchanged model of titans-pytorch 0.5",
                )
