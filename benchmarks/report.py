"""The common fields of result files, and writing them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from titans_export.bench.machine import describe_commit, describe_machine, describe_packages
from titans_export.files import replacing_file

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **describe_commit(),
        "machine": describe_machine(),
        "packages": describe_packages(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file with rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as aside:
        aside.write_text(json.dumps(rounded(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Numbers rounded to five digits, more than their accuracy; None for non-finite ones."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if abs(value) < float("inf") else None
