"""Checkpoint formats: one module or package each, named as the format, that gives a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from . import titans, titans_pytorch, titans_pytorch_mlx
from .checkpoint import Checkpoint, LoadOptions

FORMATS: dict[str, Callable[[Path, LoadOptions], Checkpoint]] = {
    "titans": titans.load_with,
    "titans-pytorch": titans_pytorch.load,
    "titans-pytorch-mlx": titans_pytorch_mlx.load,
}


def load_checkpoint(path: Path, format: str = "titans", options: LoadOptions | None = None) -> Checkpoint:
    """Loads a checkpoint of the named format. Raises CheckpointError, or UsageError for an unknown format or an option
    that the format does not have.
    """
    if format not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        problem = f"unknown format: expected one of {known}, got {format!r}"
        raise UsageError("E0104", "checkpoint", problem, "give --format one of these")
    return FORMATS[format](path, options or LoadOptions())


__all__ = ["FORMATS", "Checkpoint", "LoadOptions", "load_checkpoint"]
