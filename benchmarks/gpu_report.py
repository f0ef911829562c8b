"""The JSON report of a check. Each part fills it in a separate run: it is read, merged, and renamed into place
atomically.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report
from titans_export.errors import OutputError, TitansError

SCHEMA = 1
DONE, FAILED, PARTIAL, NOT_RUN = "done", "failed", "partial", "not run"
# Parts share a report only if these fields are equal.
IDENTITY = ("sources", "device", "cuda")


class Report:
    """A file with `what` ("gpu_check"), the machine, and its parts by name."""

    def __init__(self, path: Path, what: str, description: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"check": what, "schema": SCHEMA, **description, "parts": {}}
        if path.exists():
            self._content["parts"] = self._earlier(what, description)

    @property
    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = self._content["parts"]
        return parts

    def part(self, name: str) -> dict[str, Any]:
        """An earlier run's result of the part; empty without one."""
        found: dict[str, Any] = self.parts.get(name, {})
        return found

    def save(self, name: str, status: str, **content: Any) -> None:
        """Replaces a part and writes the file."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.parts[name] = {"status": status, "date": now.date().isoformat(), **content}
        self._content["date"] = now.date().isoformat()
        report.write(self._path, self._content)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Records the reason in the report if the part cannot run here or fails."""
        try:
            yield
        except TitansError as error:
            status = NOT_RUN if error.exit_code == 4 else FAILED
            self.save(name, status, **{**_kept(self.part(name)), "reason": str(error)})
            raise

    def _earlier(self, what: str, description: dict[str, Any]) -> dict[str, Any]:
        """The parts in the file. Raises if they come from other sources or another machine."""
        fix = "give another -o, or remove that file"
        try:
            earlier = json.loads(self._path.read_text(encoding="utf-8"))
            parts: dict[str, Any] = earlier["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError("E0909", what, f"{self._path} is not a report: {error}", fix) from error
        if (earlier.get("check"), earlier.get("schema")) != (what, SCHEMA):
            got = f"{earlier.get('check')}, schema {earlier.get('schema')}"
            problem = f"{self._path} is another report: expected {what}, schema {SCHEMA}, got {got}"
            raise OutputError("E0909", what, problem, fix)
        ours = report.rounded(description)
        for key in IDENTITY:
            if earlier.get(key) != ours[key]:
                problem = f"{self._path} has another {key}: expected {ours[key]}, got {earlier.get(key)}"
                raise OutputError("E0909", what, problem, fix)
        return parts


def _kept(part: dict[str, Any]) -> dict[str, Any]:
    """The finished results that a failed part keeps from the previous run."""
    return {key: value for key, value in part.items() if key == "rows"}


def failed_parts(parts: dict[str, Any]) -> list[str]:
    return [name for name, part in parts.items() if part["status"] == FAILED]
