"""Checkpoint formats: one module each, named as the format, that gives a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from . import titans
from .checkpoint import Checkpoint

FORMATS: dict[str, Callable[[Path], Checkpoint]] = {"titans": titans.load}


def load_checkpoint(path: Path, format: str = "titans") -> Checkpoint:
    """Loads a checkpoint of the named format. Raises CheckpointError, or UsageError for an unknown format."""
    if format not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise UsageError("checkpoint", f"a format out of {known}", repr(format), "give --format one of these")
    return FORMATS[format](path)


__all__ = ["FORMATS", "Checkpoint", "load_checkpoint"]
