"""Generates the table of docs/support-matrix.md from the result files and benchmarks/support.json.

python -m benchmarks.gpu_matrix            writes it between the page's markers
python -m benchmarks.gpu_matrix --check    exit code 1 if the page differs
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT
from titans_export.engines.targets import TARGETS, Target
from titans_export.files import replacing_file

DOCUMENT = ROOT / "docs" / "support-matrix.md"
COMPILED = ROOT / "benchmarks" / "support.json"
MARKERS = "<!-- matrix -->", "<!-- end of matrix -->"
COLUMNS = ("kernel", "plugin", "engine", "runtime")
HEADER = ("target", "sm", "kernel", "TensorRT plugin", "engine build", "runtime")
COMPILED_ONLY, NOT_TRIED, NOTHING = "compiled only", "not tried", "-"
# Device names in drivers that differ from the target's name in capitals.
NAMES = {
    "orin-nano": r"Orin Nano", "orin-agx": r"AGX Orin", "thor": r"Thor", "dgx-spark": r"GB10",
    "rtx-30": r"RTX 30\d\d", "rtx-40": r"RTX 40\d\d", "rtx-50": r"RTX 50\d\d",
}  # fmt: skip

Result = dict[str, Any]
Runs = dict[tuple[str, str], tuple[str, str]]  # target and column to date and device


def read_results(folder: Path = RESULTS) -> list[Result]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def target_of(device: dict[str, Any]) -> Target | None:
    """The target of a GPU, by its compute capability and the name of its board or device."""
    name = f"{device.get('board') or ''} {device['name']}"
    for target in TARGETS.values():
        pattern = NAMES.get(target.name, rf"\b{target.name}\b")
        if target.sm == device["sm"] and re.search(pattern, name, re.IGNORECASE):
            return target
    return None


def runs(results: Sequence[Result]) -> Runs:
    """The newest run of every cell."""
    found: Runs = {}

    def add(target: str, column: str, date: str, device: str) -> None:
        found[target, column] = max(found.get((target, column), ("", "")), (date, device))

    for result in results:
        if result.get("check") == "gpu_check":
            target = target_of(result["device"])
            for part, column in (("test", "kernel"), ("plugin", "plugin"), ("engines", "runtime")):
                entry = result["parts"].get(part, {})
                if target is not None and entry.get("status") == "done":
                    add(target.name, column, entry["date"], result["device"]["name"])
        elif result.get("check") == "device_check":
            for part, columns in (("engines", ("engine",)), ("run", ("kernel", "plugin", "runtime"))):
                entry = result["parts"].get(part, {})
                for column in columns if entry.get("status") == "done" else ():
                    add(result["target"], column, entry["date"], result["device"]["name"])
        elif result.get("check") == "engine" and result["verify"]["passed"]:
            add(result["target"], "engine", result["date"], result["machine"]["processor"])
        elif result.get("passed") and result.get("benchmark") in ("layer", "model"):
            column = {"layer": "kernel", "model": "runtime"}[result["benchmark"]]
            add("cpu", column, result["date"], result["machine"]["processor"])
    return found


def cell(target: Target, column: str, ran: Runs, compiled: dict[str, Any]) -> str:
    if (target.name, column) in ran:
        date, device = ran[target.name, column]
        return f"run on {device}, {date}"
    if target.sm is None:
        return NOTHING if column == "plugin" else NOT_TRIED
    return COMPILED_ONLY if target.sm in compiled[column]["sm"] else NOT_TRIED


def render(results: Sequence[Result], compiled: dict[str, Any]) -> str:
    """The table, and the meaning of "compiled only" in each column."""
    ran = runs(results)
    rows = [HEADER, ["---"] * len(HEADER)]
    for target in TARGETS.values():
        cells = (cell(target, column, ran, compiled) for column in COLUMNS)
        rows.append([f"`{target.name}`, {target.device}", str(target.sm or "-"), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = "\n".join(f"- {name}: {compiled[column]['how']}." for name, column in zip(HEADER[2:], COLUMNS, strict=True))
    return f"{table}\n\nWhat was compiled, by column:\n\n{notes}"


def fill(text: str, table: str) -> str:
    """The page with the table between its markers."""
    first, last = MARKERS
    start, end = text.index(first) + len(first), text.index(last)
    return f"{text[:start]}\n{table}\n{text[end:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = sys.argv[1:] if arguments is None else arguments
    text = DOCUMENT.read_text(encoding="utf-8")
    compiled = json.loads(COMPILED.read_text(encoding="utf-8"))["compiled"]
    filled = fill(text, render(read_results(), compiled))
    if "--check" in options:
        if filled != text:
            print(
                f"[gpu_matrix] {DOCUMENT.name} differs from the result files. Fix: run python -m benchmarks.gpu_matrix",
                file=sys.stderr,
            )
        return int(filled != text)
    with replacing_file(DOCUMENT) as aside:
        aside.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
