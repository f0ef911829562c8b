"""Sends the library's log to the logger "titans_runtime" of the module logging."""

from __future__ import annotations

import atexit
import logging

from ._library import LogFunction, check, lib

LEVELS = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}
DEBUG = 4

logger = logging.getLogger("titans_runtime")


def _tell(_user: int | None, level: int, message: bytes) -> None:
    logger.log(LEVELS[level], "%s", message.decode("utf-8", "replace"))


_function = LogFunction(_tell)  # kept alive for the library


def send_to_logging() -> None:
    """Connects the logger. Failures are raised too, so without logging set up they are reported once."""
    logger.addHandler(logging.NullHandler())
    check(lib.titans_set_log(_function, None, DEBUG))
    # Threads may continue while the interpreter exits.
    atexit.register(lib.titans_set_log, LogFunction(), None, DEBUG)
