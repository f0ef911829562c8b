"""Structured logs: one JSON object per line on stderr. They hold no text, tokens or names of users."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

_LOGGER = logging.getLogger("titans_export.serve")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log(event: str, level: int = logging.INFO, *, trace: BaseException | None = None, **fields: Any) -> None:
    """One line: an event and its fields."""
    _LOGGER.log(level, event, extra={"fields": fields}, exc_info=trace)


def log_to_stderr() -> None:
    """Sends the server's log, the runtime's and uvicorn's to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name, level in (("titans_export.serve", logging.INFO), ("titans_runtime", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
