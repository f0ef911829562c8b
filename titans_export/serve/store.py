"""The store of streams: a few operations that a folder and an object store can both offer.

Fencing rests on `append`: it succeeds only at the end that the writer has read. A server that missed a record of
another one is refused, so no record is ever lost or applied twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class End:
    """The end of a log, as read: number of records, and bytes if the log is one file."""

    records: int
    bytes: int = 0


class Store(Protocol):
    """Paths are relative, with / between folders. Failures are OSError; a missing path is FileNotFoundError.

    What a call wrote is durable when it returns. Any number of threads and processes may use a store.
    """

    @property
    def url(self) -> str:
        """The place, for users."""

    def names(self, folder: str) -> list[str]:
        """The files and folders in a folder, sorted; empty if there is no such folder."""

    def size(self, path: str) -> int:
        """The bytes of a file or log."""

    def read(self, path: str) -> bytes:
        """A file's content."""

    def create(self, path: str, content: bytes) -> None:
        """Writes a new file whole. Raises FileExistsError."""

    def remove(self, path: str) -> None:
        """Removes a file, a log or an empty folder; a missing one is not an error."""

    def create_log(self, path: str, payload: bytes) -> End:
        """A new log with one record. Raises FileExistsError."""

    def read_log(self, path: str) -> tuple[list[bytes], End]:
        """All whole records. Raises DamagedLog if one of them is damaged."""

    def is_end(self, path: str, end: End) -> bool:
        """Whether the log still ends where it was read."""

    def append(self, path: str, end: End, payload: bytes) -> End:
        """Adds a record at the end that was read. Raises Fenced if the log has gone on, or is gone."""

    def save(self, path: str, write: Callable[[Path], None]) -> None:
        """Stores the local file that `write` makes at the path it is given."""

    def open(self, path: str) -> AbstractContextManager[Path]:
        """A local file with the content of a stored one, valid within the block."""


def open_store(url: str) -> Store:
    """The store of a folder or an fsspec URL. Makes the folder. Raises OSError, ConfigError, ImportError."""
    if "://" in url:
        from .fsspec_store import FsspecStore

        return FsspecStore(url)
    from .folder_store import FolderStore

    return FolderStore(Path(url))
