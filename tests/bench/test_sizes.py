"""The benchmark of sizes: its steps, its growth law and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import sizes, table


def step(peak: float, seconds: float) -> dict[str, Any]:
    return {
        "peak_bytes": peak,
        "seconds": 2 * seconds,
        "processor_seconds": seconds,
        "weights_bytes": 1e9,
        "load_before": 1.5,
    }


def test_the_law_is_the_line_through_the_sizes() -> None:
    measured = {
        "20M": {"weights_bytes": 1e9, "steps": {"export": step(2.5e9, 30.0), "open": step(1e9, 1.0)}},
        "170M": {"weights_bytes": 3e9, "steps": {"export": step(6.5e9, 70.0)}},
    }
    law = sizes.law(measured)
    assert list(law) == ["export"]  # a single size has no law
    assert law["export"] == pytest.approx(
        {
            "sizes": 2,
            "peak_bytes_per_byte": 2.0,
            "peak_bytes_at_zero": 0.5e9,
            "processor_seconds_per_gb": 20.0,
            "processor_seconds_at_zero": 10.0,
        }
    )


def test_every_reach_is_of_a_step() -> None:
    assert set(sizes.REACH) <= set(sizes.commands(Path()))
    assert all(name.startswith("stream") for name in set(sizes.commands(Path())) - set(sizes.REACH))


def test_a_row_holds_a_step_and_its_reach() -> None:
    result = {
        "sizes": {"1.3B": {"weights_bytes": 1e9, "steps": {"export": step(2.5e9, 30.0), "stream": step(1e9, 1.0)}}},
        "law": {},
        "reach": sizes.REACH,
        "niceness": 0,
        "date": "2026-01-01",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "others_busy": 0.25,
        "packages": {},
        "machine": {
            "cores": 2, "processor": "P", "architecture": "x86_64", "flags": [], "caches": {}, "memory_bytes": 1,
            "system": "Linux", "python": "3.11",
        },
    }  # fmt: skip
    text = table.sizes(result)
    assert "| 1.3B | 1.00 GB | export | 60 | 30 | 2.50 GB | 3.50 GB | 1.5 |" in text
    assert "| 1.3B | 1.00 GB | stream | 2 | 1 | 1.00 GB | - | 1.5 |" in text


def test_files_are_kept_in_a_folder() -> None:
    result = CliRunner().invoke(sizes.main, ["--keep"])
    assert result.exit_code == 2
    assert "--keep needs --folder" in result.output
