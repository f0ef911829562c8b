"""The one check of names and texts that come from a file, and the one way to print them.

runtime/src/base/names.h has the same rules; a test compares the two. docs/bundle.md states them.
"""

from __future__ import annotations

import re

LONGEST_NAME = 128  # characters of a name, which are bytes too
LONGEST_KEY = 512  # bytes of a key of JSON
LONGEST_TEXT = 4096  # bytes of a text
PLAIN = "letters, digits and . _ - +, beginning with a letter, a digit or _"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# Characters that a terminal obeys or does not show: controls, marks of direction and width, line separators, tags.
HIDDEN = (
    (0x00, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x61C, 0x61C), (0x180E, 0x180E), (0x200B, 0x200F), (0x2028, 0x202E),
    (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0xE0000, 0xE007F),
)  # fmt: skip
_HIDDEN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in HIDDEN) + "]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_plain(name: str) -> bool:
    """Whether a name may become a part of a path, a word of a script or a label."""
    return len(name) <= LONGEST_NAME and _PLAIN.fullmatch(name) is not None


def is_text(text: str) -> bool:
    """Whether a text is Unicode without hidden characters, so that it is on the screen what it is in the file."""
    return _HIDDEN.search(text) is None and _SURROGATE.search(text) is None


def shown(text: str, keep: str = "") -> str:
    """The text with hidden characters as escapes of their number, except those of `keep`."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
