"""Checkpoint formats: one module or package each, named as the format, that gives a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..checkpoint_formats import FORMATS
from ..errors import UsageError
from ..manifest import Model
from . import titans, titans_pytorch, titans_pytorch_mlx
from .checkpoint import Checkpoint, LoadOptions

_READERS: dict[str, Callable[[Path, LoadOptions], Checkpoint]] = dict(
    zip(FORMATS, (titans.load_with, titans_pytorch.load, titans_pytorch_mlx.load), strict=True)
)


def load_checkpoint(path: Path, format: str = "titans", options: LoadOptions | None = None) -> Checkpoint:
    """Loads a checkpoint of the named format. Raises CheckpointError, or UsageError for an unknown format or an option
    that the format does not have.
    """
    if format not in _READERS:
        known = ", ".join(FORMATS)
        problem = f"unknown format: expected one of {known}, got {format!r}"
        raise UsageError("E0104", "checkpoint", problem, "give --format one of these")
    return _READERS[format](path, options or LoadOptions())


def options_of(model: Model, config: str | None, weights: str | None) -> LoadOptions:
    """The options with which a bundle's model was loaded, to load its checkpoint again.

    config, weights: what the user gives now; `weights` None takes what the bundle was exported with.
    """
    source = model.source
    return LoadOptions(
        config,
        (model.config or {}).get("bug_compatible_after"),
        weights or (source.weights if source else None),
        bool(source and source.library_defaults),
    )


__all__ = ["FORMATS", "Checkpoint", "LoadOptions", "load_checkpoint", "options_of"]
