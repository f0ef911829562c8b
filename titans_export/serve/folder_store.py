"""A store in a folder of a local or network file system. A log is one file."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import Fenced
from .frames import frame, read_frames
from .store import End


class FolderStore:
    """Files have mode 0600, folders 0700. Appends of one log wait for each other by a lock on its file."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return str(self._root)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._root / folder) if not name.endswith(".tmp"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        return (self._root / path).stat().st_size

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def create(self, path: str, content: bytes) -> None:
        create_file(self._root / path, content)

    def remove(self, path: str) -> None:
        target = self._root / path
        with suppress(FileNotFoundError):
            if target.is_dir():
                with suppress(OSError):  # another server has made a file in it
                    target.rmdir()
            else:
                target.unlink()

    def create_log(self, path: str, payload: bytes) -> End:
        content = frame(payload)
        create_file(self._root / path, content)
        return End(1, len(content))

    def read_log(self, path: str) -> tuple[list[bytes], End]:
        payloads, end = read_frames(self.read(path))
        return payloads, End(len(payloads), end)

    def is_end(self, path: str, end: End) -> bool:
        try:
            return (self._root / path).stat().st_size == end.bytes
        except FileNotFoundError:
            return False

    def append(self, path: str, end: End, payload: bytes) -> End:
        content = frame(payload)
        try:
            handle = os.open(self._root / path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Fenced(path) from None
        try:
            with suppress(OSError):  # a file system without locks has one server, see docs/serving.md
                fcntl.flock(handle, fcntl.LOCK_EX)
            status = os.fstat(handle)
            if not status.st_nlink or status.st_size < end.bytes:
                raise Fenced(path)
            if status.st_size > end.bytes:
                if read_frames(os.pread(handle, status.st_size - end.bytes, end.bytes))[0]:
                    raise Fenced(path)
                os.ftruncate(handle, end.bytes)  # a torn record of a server that crashed
            try:
                _write_all(handle, content, end.bytes)
                os.fsync(handle)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, end.bytes)
                    os.fsync(handle)
                raise
        finally:
            os.close(handle)
        return End(end.records + 1, end.bytes + len(content))

    def save(self, path: str, write: Callable[[Path], None]) -> None:
        target = self._root / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(target)  # the runtime renames it into place and synchronises it

    @contextmanager
    def open(self, path: str) -> Iterator[Path]:
        yield self._root / path


def create_file(target: Path, content: bytes) -> None:
    """Writes a new file, whole and durable. Raises FileExistsError."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(handle, content, 0)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.link(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(target.parent)
    sync_folder(target.parent.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
