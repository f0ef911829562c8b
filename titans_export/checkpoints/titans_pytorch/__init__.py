"""Checkpoints of titans-pytorch 0.5: a state dict, and the constructor's arguments as JSON."""

from __future__ import annotations

from .build import from_live, load
from .live import from_module
from .source import Source, read

__all__ = ["Source", "from_live", "from_module", "load", "read"]
