"""Real text for benchmarks, about two million bytes: the sources of Python and its packages."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


def source_files() -> Iterator[Path]:
    """The .py files of this Python, in a fixed order, each once. The standard library comes first."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    yield from (path for path in sorted(library.rglob("*.py")) if packages not in path.parents)
    yield from sorted(packages.rglob("*.py"))


def pieces(files: Iterable[Path], size: int, count: int) -> Iterator[bytes]:
    """The first `count` bytes of the concatenated files, in pieces of `size` bytes; the last may be shorter.

    Stops early at the end of the files. Uses one buffer, whatever their size.
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
    """The first `count` bytes of `source_files`, or fewer if the files are shorter."""
    return b"".join(pieces(source_files(), 1 << 16, count))
