"""A store in a file system of fsspec, such as an object store. A log is a folder with one object per record."""

from __future__ import annotations

import inspect
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from .errors import ConfigError, DamagedLog, Fenced
from .folder_store import create_file
from .frames import frame, read_frames
from .store import End

_MEMORY_LOCK = threading.Lock()  # the in-memory file system tests and writes in two steps


class FsspecStore:
    """Needs a file system that can create an object only if it is missing: records are fenced by that."""

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(url)
        self._fs.use_listings_cache = False
        self._root, self._url = root.rstrip("/"), url
        if not isinstance(self._fs, (LocalFileSystem, MemoryFileSystem)) and not _creates_exclusively(self._fs):
            problem = f"the file system of {url} cannot create an object only if it is missing"
            raise ConfigError("E1219", "store", problem, "choose another store, such as a folder")

    @property
    def url(self) -> str:
        return self._url

    def names(self, folder: str) -> list[str]:
        try:
            self._fs.invalidate_cache()
            found = self._fs.ls(self._path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return sorted(name for name in names if not name.endswith(".tmp"))

    def size(self, path: str) -> int:
        target = self._path(path)
        if self._fs.isdir(target):
            return sum(int(self._fs.size(one)) for one in self._fs.ls(target, detail=False))
        return int(self._fs.size(target))

    def read(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(path)))

    def create(self, path: str, content: bytes) -> None:
        target = self._path(path)
        if isinstance(self._fs, LocalFileSystem):
            create_file(Path(target), content)
        elif isinstance(self._fs, MemoryFileSystem):
            with _MEMORY_LOCK:
                if self._fs.exists(target):
                    raise FileExistsError(target)
                self._fs.pipe_file(target, content)
        else:
            self._fs.pipe_file(target, content, mode="create")

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(path), recursive=True)

    def create_log(self, path: str, payload: bytes) -> End:
        self.create(f"{path}/{0:010d}", frame(payload))
        return End(1)

    def read_log(self, path: str) -> tuple[list[bytes], End]:
        payloads = []
        names = self.names(path)
        if not names:
            raise FileNotFoundError(path)
        for number, name in enumerate(names):
            found, _ = read_frames(self.read(f"{path}/{name}"))
            if name != f"{number:010d}" or len(found) != 1:
                raise DamagedLog(f"object {path}/{name}")
            payloads += found
        return payloads, End(len(payloads))

    def is_end(self, path: str, end: End) -> bool:
        before, after = (self._path(f"{path}/{end.records + step:010d}") for step in (-1, 0))
        return bool(self._fs.exists(before)) and not self._fs.exists(after)

    def append(self, path: str, end: End, payload: bytes) -> End:
        # The record before it shows that the log was not removed meanwhile.
        if not self._fs.exists(self._path(f"{path}/{end.records - 1:010d}")):
            raise Fenced(path)
        try:
            self.create(f"{path}/{end.records:010d}", frame(payload))
        except FileExistsError:
            raise Fenced(path) from None
        return End(end.records + 1)

    def save(self, path: str, write: Callable[[Path], None]) -> None:
        target = self._path(path)
        with tempfile.TemporaryDirectory(prefix="titans-serve-") as folder:
            local = Path(folder, "state.tstate")
            write(local)
            if isinstance(self._fs, LocalFileSystem):
                create_file(Path(target), local.read_bytes())
            else:
                self._fs.pipe_file(target, local.read_bytes())

    @contextmanager
    def open(self, path: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="titans-serve-") as folder:
            local = Path(folder, "state.tstate")
            local.write_bytes(self.read(path))
            yield local

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _creates_exclusively(fs: Any) -> bool:
    """Whether the file system's own pipe_file takes a mode; the general one tests and writes in two steps."""
    pipe = getattr(type(fs), "_pipe_file", None) or type(fs).pipe_file
    if pipe is fsspec.AbstractFileSystem.pipe_file:
        return False
    return "mode" in inspect.signature(pipe).parameters
