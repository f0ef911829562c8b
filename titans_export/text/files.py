"""Text files: any file that can be read once from start to end, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UsageError
from .base import EmptyTextError, Tokenizer, Tokens

STDIN = "-"


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The open file; `-` is stdin. Raises UsageError if stdin is closed, OSError."""
    if str(path) == STDIN:
        if sys.stdin is None:
            raise UsageError("E0103", "text", "stdin is closed", "give the name of a file, or a text on stdin")
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file


def read_tokens(path: Path, tokenizer: Tokenizer, most: int | None = None) -> tuple[Tokens, int]:
    """The first `most` tokens of a text, or all, and the bytes of the blocks read.

    Raises EmptyTextError if the text is empty.
    """
    blocks: list[Tokens] = []
    have = covered = 0
    with open_text(path) as file:
        for block, size in tokenizer.read(file):
            blocks.append(block)
            have, covered = have + len(block), covered + size
            if most is not None and have >= most:
                covered = round(covered * most / have)
                have = most
                break
    if not have:
        raise EmptyTextError("E0107", "text", f"empty text: {path}", "give a longer text")
    return np.concatenate(blocks)[:have], covered
