"""Exports that are killed lose nothing, whenever that happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kills_leave_one_bundle_whole() -> None:
    """TITANS_EXPORT_KILLS=500 kills as often."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    kills = os.environ.get("TITANS_EXPORT_KILLS", "8")
    done = subprocess.run(
        [sys.executable, str(HERE / "export_killing.py"), "--kills", kills], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] + found["finished"] == int(kills)
    assert found["kills"] > 0 and found["leftovers"] > 0, found
