"""The progress of long steps, as a caller may show it: see titans_export.cli.progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], None]  # takes the number of units done since the last call
Bar = Callable[[str, int, str], AbstractContextManager[Advance]]  # of a step's label, number of units, and unit


def no_bar(label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Shows nothing."""
    return nullcontext(lambda done: None)
