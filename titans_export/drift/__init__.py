"""Drift of one bundle's stream from another's, over text of any length (docs/drift.md)."""

from .metrics import Drift, MemoryDistance, Window
from .streams import Comparison, compare

__all__ = ["Comparison", "Drift", "MemoryDistance", "Window", "compare"]
