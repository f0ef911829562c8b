"""What the library has to say, through the logger "titans_runtime" of the module logging."""

from __future__ import annotations

import atexit
import logging

from ._library import LogFunction, check, lib

LEVELS = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}
DEBUG = 4

logger = logging.getLogger("titans_runtime")


def _tell(_user: int | None, level: int, message: bytes) -> None:
    logger.log(LEVELS[level], "%s", message.decode("utf-8", "replace"))


_function = LogFunction(_tell)  # the library calls it as long as this module is there


def send_to_logging() -> None:
    """Failures are raised as well, so an application that has not set up logging hears of them once."""
    logger.addHandler(logging.NullHandler())
    check(lib.titans_set_log(_function, None, DEBUG))
    # Threads may go on while the interpreter ends.
    atexit.register(lib.titans_set_log, LogFunction(), None, DEBUG)
