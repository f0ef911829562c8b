"""Which cases `make test` runs, and what tools/test adds to the end of pytest's report."""

from __future__ import annotations

import gc
import os
import zlib
from collections import defaultdict
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks long all but every n-th case of a test with sample(n). Skipped cases do not count.

    The first case differs from test to test, so that a parameter they share is met in all its values.
    """
    cases = defaultdict(list)
    for item in items:
        if (
            item.get_closest_marker("sample")
            and not item.get_closest_marker("skip")
            and not item.get_closest_marker("long")
        ):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, found in cases.items():
        n = found[0].get_closest_marker("sample").args[0]
        first = zlib.crc32(name.encode()) % min(n, len(found))
        for index, item in enumerate(found):
            if index % n != first:
                item.add_marker("long")


def pytest_collection_finish() -> None:
    """Modules and collected tests live until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the parts before pytest took: pytest's own time is in its last line."""
    times = os.environ.get("TITANS_TIMES")
    if times and Path(times).is_file():
        terminalreporter.section("times", sep="-")
        terminalreporter.write(Path(times).read_text(encoding="utf-8"))
