"""Rows of numbers in a temporary file, because outputs of long streams and large vocabularies need not be in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import OutputError, os_error_fix

_IN_MEMORY = 1 << 24  # bytes that a file keeps in memory at most


class RowFile:
    """Rows (T, size) of float64 that are appended in order. Slices of rows are read from the file as arrays."""

    def __init__(self, folder: Path, size: int) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self._folder, self._rows, self._size = folder, 0, size

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values of each."""
        return self._rows, self._size

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: NDArray[Any]) -> None:
        """Appends rows (t, size). Raises OutputError if the file system is full."""
        data = np.ascontiguousarray(rows, np.float64)
        assert data.ndim == 2 and data.shape[1] == self._size
        try:
            self._file.seek(0, 2)
            self._file.write(data.reshape(-1).view(np.uint8).data)
        except OSError as error:
            problem = f"cannot write temporary outputs to {self._folder}: {error.strerror or error}"
            raise OutputError("E1001", "output", problem, os_error_fix(error)) from error
        self._rows += len(data)

    def __getitem__(self, part: slice) -> NDArray[np.float64]:
        """The rows of a slice of step 1, read from the file."""
        begin, end, step = part.indices(self._rows)
        assert step == 1
        self._file.seek(8 * self._size * begin)
        data = bytearray(8 * self._size * max(0, end - begin))
        view, done = memoryview(data), 0
        while done < len(data):
            block = self._file.read(min(len(data) - done, 1 << 22))
            view[done : done + len(block)] = block
            done += len(block)
        return np.frombuffer(data, np.float64).reshape(-1, self._size)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()


@contextmanager
def row_file(folder: Path, size: int) -> Iterator[RowFile]:
    """A file for rows of `size` values on the file system of `folder`."""
    try:
        rows = RowFile(folder, size)
    except OSError as error:
        problem = f"cannot write temporary outputs to {folder}: {error.strerror or error}"
        raise OutputError("E1001", "output", problem, os_error_fix(error)) from error
    try:
        yield rows
    finally:
        rows.close()


Rows = NDArray[Any] | RowFile  # (T, size)
