"""Calibration data: streams of tokens or vectors from files."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from titans_export.bundle import Bundle
from titans_export.errors import TitansError
from titans_export.tokenizer import EmptyTextError, open_tokenizer, read_tokens

LEAST_TOKENS = 1024  # a 99.9th percentile of fewer rows is one row
LEAST_PERIODS = 4  # whole segments and chunks in one stream, so that memories are seen after they have learned
SUFFIXES = (".txt", ".npz", ".jsonl")

Stream = NDArray[Any]  # (T,) int64, or (T, size) float32


class DataError(TitansError):
    """Data that cannot be read, does not fit the bundle or is too short."""


@dataclass(frozen=True)
class Data:
    """Streams in the order of the files, and where each came from."""

    streams: tuple[Stream, ...]
    sources: tuple[str, ...]
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens or vectors in all."""
        return sum(map(len, self.streams))

    @property
    def xxh3_128(self) -> str:
        """Hash of the streams' lengths and values."""
        digest = xxhash.xxh3_128()
        for stream in self.streams:
            digest.update(len(stream).to_bytes(8, "little"))
            digest.update(stream.astype("<f4" if stream.dtype.kind == "f" else "<i8").tobytes())
        return digest.hexdigest()

    def entry(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"xxh3_128": self.xxh3_128, "tokens": self.tokens, "streams": len(self.streams)}


def read_data(
    bundle: Bundle, files: Sequence[Path], tokens: int | None, seed: int = 0, encoding_errors: str = "strict"
) -> Data:
    """The streams of the files, at most `tokens` tokens or vectors in all.

    A text is one stream; so is each array of an .npz and each line of a .jsonl. Longer data are cut: each stream gives
    a piece in proportion to its length, and `seed` draws where it starts. `-` is text on stdin, and so is a pipe.
    `encoding_errors`: see `open_tokenizer`. Raises DataError, TextError.
    """
    streams: list[Stream] = []
    sources: list[str] = []
    for file in files:
        for name, stream in _read(bundle, file, encoding_errors):
            if len(stream):
                streams.append(stream)
                sources.append(name)
    if not streams:
        names = ", ".join(map(str, files)) or "no file"
        raise DataError("E0806", "data", f"no tokens in {names}", "give --data FILE with text of the model's kind")
    total = sum(map(len, streams))
    if tokens is not None and total > tokens:
        rng = np.random.default_rng(seed)
        shares = [len(stream) * tokens // total for stream in streams]
        if not any(shares):  # more streams than tokens
            shares[int(np.argmax([len(stream) for stream in streams]))] = 1
        starts = [int(rng.integers(0, len(s) - n + 1)) for s, n in zip(streams, shares, strict=True)]
        streams = [s[at : at + n].copy() for s, at, n in zip(streams, starts, shares, strict=True)]
        sources = [name for name, piece in zip(sources, streams, strict=True) if len(piece)]
        streams = [piece for piece in streams if len(piece)]
    return Data(tuple(streams), tuple(sources), seed)


def period_of(bundle: Bundle) -> int:
    """Positions after which every chunk and segment has ended once and every graph has run."""
    graphs = bundle.manifest.graphs
    return max(math.lcm(*(graph.stride for graph in graphs)), *(graph.tokens for graph in graphs))


def check_enough(bundle: Bundle, data: Data) -> None:
    """Raises DataError if the data are too short to find ranges from."""
    period = period_of(bundle)
    longest = max(map(len, data.streams))
    unit = "vectors" if bundle.takes_vectors else "tokens"
    if data.tokens < LEAST_TOKENS:
        problem = f"too little data to find ranges: expected at least {LEAST_TOKENS} {unit}, got {data.tokens}"
        raise DataError("E0806", "data", problem, "give more data, or a larger --tokens")
    if longest < LEAST_PERIODS * period:
        problem = (
            f"streams too short, as ranges move while the memory learns: expected {LEAST_PERIODS * period} {unit} "
            f"({LEAST_PERIODS} whole chunks and segments of {period}), got {longest} in the longest stream"
        )
        raise DataError("E0806", "data", problem, "give longer streams, or a larger --tokens")


def _read(bundle: Bundle, file: Path, encoding_errors: str) -> Iterator[tuple[str, Stream]]:
    if str(file) == "-" or file.is_fifo() or file.is_char_device():
        yield str(file), _text(bundle, file, encoding_errors)
        return
    if file.suffix not in SUFFIXES:
        raise DataError("E0804", "data", f"unknown kind of file: {file}", f"give one of {', '.join(SUFFIXES)}")
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise DataError("E0804", "data", f"{file} {reason}", "check the path")
    if file.suffix == ".txt":
        yield str(file), _text(bundle, file, encoding_errors)
    elif file.suffix == ".npz":
        yield from _arrays(bundle, file)
    else:
        yield from _lines(bundle, file)


def _text(bundle: Bundle, file: Path, encoding_errors: str) -> Stream:
    if bundle.takes_vectors:
        raise DataError("E0805", "data", f"{file} is text, the bundle takes vectors", "give an .npz")
    tokenizer = open_tokenizer(bundle.manifest.tokenizer, bundle.path, bundle.manifest.input.width, encoding_errors)
    try:
        tokens, _ = read_tokens(file, tokenizer)
    except EmptyTextError:
        return np.zeros(0, np.int64)
    return _tokens(bundle, tokens, str(file))


def _arrays(bundle: Bundle, file: Path) -> Iterator[tuple[str, Stream]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = [(name, archive[name]) for name in archive.files]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        problem = f"{file} is not an .npz of plain arrays: {error}"
        raise DataError("E0804", "data", problem, "write it with numpy.savez") from None
    for name, value in found:
        where = f"{file}, array {name}"
        yield where, _vectors(bundle, value, where) if bundle.takes_vectors else _tokens(bundle, value, where)


def _lines(bundle: Bundle, file: Path) -> Iterator[tuple[str, Stream]]:
    if bundle.takes_vectors:
        raise DataError("E0805", "data", f"{file} has tokens, the bundle takes vectors", "give an .npz")
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError("E0804", "data", f"{where} is not JSON: {error}", "correct the line") from None
            if isinstance(value, dict):
                value = value.get("tokens")
            if not isinstance(value, list):
                got = "none" if value is None else repr(value)[:40]
                problem = f"{where}: expected a list of token ids, got {got}"
                raise DataError("E0804", "data", problem, 'write [1, 2] or {"tokens": [1, 2]}')
            wrong = next((item for item in value if isinstance(item, bool) or not isinstance(item, int)), None)
            if wrong is not None or any(not -(2**63) <= item < 2**63 for item in value):
                got = repr(wrong)[:40] if wrong is not None else "one beyond 64 bits"
                problem = f"{where}: expected integers as token ids, got {got}"
                raise DataError("E0804", "data", problem, "correct the line")
            yield where, _tokens(bundle, np.asarray(value, np.int64), where)


def _tokens(bundle: Bundle, value: NDArray[Any], where: str) -> Stream:
    if value.dtype.kind not in "iu" or value.ndim != 1:
        problem = f"{where}: expected a 1-D array of integers, got {value.dtype} of shape {list(value.shape)}"
        raise DataError("E0805", "data", problem, "give one array of token ids for each stream")
    size = bundle.manifest.input.width
    outside = np.flatnonzero((value < 0) | (value >= size))
    if outside.size:
        first = int(outside[0])
        problem = f"{where}: expected token ids from 0 to {size - 1}, got {value[first]} at {first}"
        raise DataError("E0805", "data", problem, "give data of this model's vocabulary")
    return value.astype(np.int64)


def _vectors(bundle: Bundle, value: NDArray[Any], where: str) -> Stream:
    size = bundle.manifest.input.width
    if value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != size:
        problem = f"{where}: expected floats of shape [T, {size}], got {value.dtype} of shape {list(value.shape)}"
        raise DataError("E0805", "data", problem, "give one array of vectors for each stream")
    result = value.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(result).all(1))
    if bad.size:
        raise DataError("E0808", "data", f"{where}: the vector at {int(bad[0])} is not finite", "correct the data")
    return result
