"""Rows in a temporary file read as an array of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans_export import row_file as module
from titans_export.errors import OutputError
from titans_export.reference import errors_of, largest_of
from titans_export.row_file import row_file


@pytest.mark.parametrize("memory", [1 << 24, 100])  # in memory, and in a file
def test_rows_are_those_that_were_appended(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY", memory)
    right = np.random.default_rng(0).standard_normal((50, 7))
    with row_file(tmp_path, 7) as rows:
        for begin, end in ((0, 1), (1, 1), (1, 30)):
            rows.append(right[begin:end])
        np.testing.assert_array_equal(rows[3:9], right[3:9])
        rows.append(right[30:].astype(np.float32))  # after a read
        right[30:] = right[30:].astype(np.float32)
        assert rows.shape == (50, 7) and len(rows) == 50
        np.testing.assert_array_equal(rows[:], right)
        np.testing.assert_array_equal(rows[48:99], right[48:])
        assert rows[9:3].shape == (0, 7)
        np.testing.assert_array_equal(errors_of(right[:20] + 1, rows), np.abs(right[:20] + 1 - right[:20]).max(-1))
        np.testing.assert_array_equal(largest_of(rows), np.abs(right).max(-1))
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    with row_file(tmp_path, 3) as rows:
        monkeypatch.setattr(rows._file, "write", full)
        with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
            rows.append(np.zeros((2, 3)))
