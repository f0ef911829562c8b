"""Calibration data: every kind of file, and every way in which one is wrong."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from manifests import bundle_of

from titans_calibration.data import (
    LEAST_PERIODS,
    LEAST_TOKENS,
    Data,
    DataError,
    check_enough,
    period_of,
    read_data,
)
from titans_export.bundle import Bundle
from titans_export.errors import BundleError

GRAPHS = (("prefill", 128, 32), ("segment", 48, 48), ("decode", 1, 1))
BYTES = bundle_of(size=256, graphs=GRAPHS)
IDS = bundle_of(size=100, graphs=GRAPHS, tokenizer={"kind": "none"})
VECTORS = bundle_of(vectors=True, size=3, graphs=GRAPHS)


def _write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    return path


def test_every_kind_of_file_gives_its_streams(tmp_path: Path) -> None:
    files = [
        _write(tmp_path, "a.txt", b"To be"),
        _write(tmp_path, "b.npz", {"one": np.arange(4, dtype=np.uint8), "two": np.arange(3)}),
        _write(tmp_path, "c.jsonl", b'[7, 8]\n\n{"tokens": [9], "id": "x"}\n[]\n'),
    ]
    data = read_data(BYTES, files, None)
    assert [stream.tolist() for stream in data.streams] == [list(b"To be"), [0, 1, 2, 3], [0, 1, 2], [7, 8], [9]]
    assert data.tokens == 15
    assert data.sources[1].endswith("b.npz, array one")
    assert data.sources[4].endswith("c.jsonl, line 3")
    assert all(stream.dtype == np.int64 for stream in data.streams)
    vectors = np.arange(12, dtype=np.float64).reshape(4, 3)
    found = read_data(VECTORS, [_write(tmp_path, "d.npz", {"x": vectors})], None)
    assert found.streams[0].dtype == np.float32
    np.testing.assert_array_equal(found.streams[0], vectors)


def test_pipes_and_devices_are_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"To be",))
    writer.start()
    data = read_data(BYTES, [tmp_path / "pipe", _write(tmp_path, "b.txt", b"\xef\xbb\xbf\0\xff\r\n")], None)
    writer.join()
    assert [stream.tolist() for stream in data.streams] == [list(b"To be"), list(b"\xef\xbb\xbf\0\xff\r\n")]
    with pytest.raises(DataError, match="no tokens"):
        read_data(BYTES, [Path(os.devnull)], None)


def test_the_hash_is_of_values_and_where_streams_end() -> None:
    def of(*streams: list[int]) -> str:
        return Data(tuple(np.array(s, np.int64) for s in streams), ("x",) * len(streams), 0).xxh3_128

    assert of([1, 2], [3]) == of([1, 2], [3])
    assert len({of([1, 2], [3]), of([1], [2, 3]), of([1, 2, 3]), of([1, 2], [4])}) == 4


def test_longer_data_gives_pieces_that_the_seed_draws(tmp_path: Path) -> None:
    values = np.arange(3000, dtype=np.int64) % 256
    file = _write(tmp_path, "a.npz", {"long": values, "short": values[:1000]})
    chosen = [read_data(BYTES, [file], 400, seed) for seed in (0, 0, 1)]
    assert chosen[0].xxh3_128 == chosen[1].xxh3_128 != chosen[2].xxh3_128
    for data in chosen:
        assert [len(stream) for stream in data.streams] == [300, 100]
        for stream in data.streams:
            np.testing.assert_array_equal(np.diff(stream) % 256, 1)  # in one piece
    assert read_data(BYTES, [file], 4000, 1).tokens == 4000


@pytest.mark.parametrize(("most", "sources"), [(300, ["long"]), (5, ["long"]), (900, ["long", *map(str, range(500))])])
def test_many_short_streams_take_no_more_than_was_asked_for(most: int, sources: list[str], tmp_path: Path) -> None:
    arrays = {str(i): np.array([1, 2]) for i in range(500)} | {"long": np.arange(800) % 256}
    data = read_data(BYTES, [_write(tmp_path, "a.npz", {"long": arrays.pop("long")} | arrays)], most)
    assert 0 < data.tokens <= most
    assert [source.rpartition(" ")[2] for source in data.sources] == sources
    assert len(data.streams) == len(sources)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([LEAST_TOKENS - 1], (str(LEAST_TOKENS), str(LEAST_TOKENS - 1))), ([383] * 3, ("512", "383", "memory learns"))],
)
def test_too_little_data_says_how_much_is_needed(tokens: list[int], words: tuple[str, ...]) -> None:
    assert period_of(BYTES) * LEAST_PERIODS == 512
    data = Data(tuple(np.zeros(n, np.int64) for n in tokens), ("x",) * len(tokens), 0)
    with pytest.raises(DataError) as raised:
        check_enough(BYTES, data)
    for word in words:
        assert word in str(raised.value)
    check_enough(BYTES, Data((np.zeros(LEAST_TOKENS, np.int64),), ("x",), 0))


def _floats(value: float) -> npt.NDArray[np.float32]:
    return np.full((2, 3), value, np.float32)


WRONG: dict[str, tuple[Bundle, str, Any, tuple[str, ...]]] = {
    "an id too large": (IDS, "a.npz", {"x": np.array([1, 100])}, ("0 to 99", "100 at 1", "array x")),
    "an id below zero": (IDS, "a.npz", {"x": np.array([-1])}, ("-1 at 0",)),
    "ids beyond int64": (IDS, "a.npz", {"x": np.array([2**63], np.uint64)}, ("0 to 99",)),
    "floats for tokens": (IDS, "a.npz", {"x": np.ones(4)}, ("integers", "float64")),
    "a batch": (IDS, "a.npz", {"x": np.ones((2, 2), int)}, ("1-D", "[2, 2]")),
    "objects": (IDS, "a.npz", {"x": np.array([None])}, ("plain arrays", "numpy.savez")),
    "no archive": (IDS, "a.npz", b"PK or not", ("plain arrays",)),
    "half an archive": (IDS, "a.npz", b"PK\x03\x04", ("plain arrays",)),
    "tokens for vectors": (VECTORS, "a.npz", {"x": np.arange(4)}, ("[T, 3]", "int64")),
    "vectors of another size": (VECTORS, "a.npz", {"x": np.ones((2, 4))}, ("[T, 3]", "[2, 4]")),
    "a vector that is not finite": (VECTORS, "a.npz", {"x": _floats(np.nan)}, ("finite", "at 0")),
    "a vector too large for float32": (VECTORS, "a.npz", {"x": np.full((1, 3), 1e300)}, ("finite",)),
    "text for vectors": (VECTORS, "a.txt", b"abc", (".npz", "a.txt")),
    "lines for vectors": (VECTORS, "a.jsonl", b"[1]", (".npz",)),
    "no JSON": (IDS, "a.jsonl", b"[1]\n[2", ("JSON", "line 2")),
    "no UTF-8": (IDS, "a.jsonl", b"\xff\xfe\xfd", ("JSON", "line 1")),
    "no list": (IDS, "a.jsonl", b'{"ids": [1]}', ("list of token ids", "line 1", "none")),
    "text in a line": (IDS, "a.jsonl", b'{"tokens": "abc"}', ("list of token ids",)),
    "a float in a line": (IDS, "a.jsonl", b"[1, 2.5]", ("integers", "2.5")),
    "a bool in a line": (IDS, "a.jsonl", b"[true]", ("integers", "True")),
    "a large number in a line": (IDS, "a.jsonl", b"[" + str(2**70).encode() + b"]", ("integers", "64 bits")),
    "another kind of file": (IDS, "a.csv", b"1,2", (".jsonl", "a.csv")),
    "nothing": (BYTES, "a.txt", b"", ("no tokens", "a.txt")),
    "empty lines": (IDS, "a.jsonl", b"\n[]\n", ("no tokens",)),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_told_by_name(case: str, tmp_path: Path) -> None:
    bundle, name, content, words = WRONG[case]
    with pytest.raises(DataError) as raised:
        read_data(bundle, [_write(tmp_path, name, content)], None)
    for word in words:
        assert word in str(raised.value)


def test_missing_files_and_tokenizers(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "none.txt", "does not exist"), (tmp_path / "folder.txt", "is a folder")):
        (tmp_path / "folder.txt").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=word):
            read_data(BYTES, [path], None)
    with pytest.raises(DataError, match="no file"):
        read_data(BYTES, [], None)
    with pytest.raises(BundleError, match="tokenizer"):
        read_data(IDS, [_write(tmp_path, "a.txt", json.dumps([1]).encode())], None)
