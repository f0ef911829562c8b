"""Names of streams and owners. They are names of folders, so only harmless characters are allowed."""

from __future__ import annotations

import re

from .errors import ServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,127}$"


def is_name(text: str) -> bool:
    """Whether the text is a name."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str) -> str:
    """The name. Raises ServeError."""
    if not is_name(text):
        fix = "use up to 128 letters, digits, - and _, a letter or digit first"
        raise ServeError(400, "E1203", "request", "invalid name of a stream", fix)
    return text
