"""What tools/test adds to the end of pytest's report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the parts before pytest took: pytest's own time is in its last line."""
    times = os.environ.get("TITANS_TIMES")
    if times and Path(times).is_file():
        terminalreporter.section("times", sep="-")
        terminalreporter.write(Path(times).read_text(encoding="utf-8"))
