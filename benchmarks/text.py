"""Two million bytes of real text that are on every machine: the sources of Python and of its packages."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


def source_files() -> Iterator[Path]:
    """The .py files of this Python, the standard library's first; each once, in the same order every time."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    yield from (path for path in sorted(library.rglob("*.py")) if packages not in path.parents)
    yield from sorted(packages.rglob("*.py"))


def pieces(files: Iterable[Path], size: int, count: int) -> Iterator[bytes]:
    """The first `count` bytes of the files, one after the other, in pieces of `size` bytes, the last one shorter.

    Ends early where the files do. Reads through one buffer, however long they are.
    """
    buffer, filled = bytearray(size), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count and (got := file.readinto(memoryview(buffer)[filled : min(size, count + filled)])):
                filled, count = filled + got, count - got
                if filled == size:
                    yield bytes(buffer)
                    filled = 0
        if not count:
            break
    if filled:
        yield bytes(buffer[:filled])


def standard_library(count: int) -> bytes:
    """The first `count` bytes of `source_files`, or all where there are fewer."""
    return b"".join(pieces(source_files(), 1 << 16, count))
