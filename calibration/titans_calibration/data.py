"""What a bundle is calibrated on: streams of tokens or vectors from files, never made up."""

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
from titans_export.tokenizer import open_tokenizer

LEAST_TOKENS = 1024  # a 99.9th percentile of fewer rows is one row
LEAST_PERIODS = 4  # whole segments and chunks in one stream, so that memories are seen after they have learned
SUFFIXES = (".txt", ".npz", ".jsonl")

Stream = NDArray[Any]  # (T,) int64, or (T, size) float32


class DataError(TitansError):
    """Data that cannot be read, does not fit the bundle or is too little."""


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
        """What the manifest says of it."""
        return {"xxh3_128": self.xxh3_128, "tokens": self.tokens, "streams": len(self.streams)}


def read_data(bundle: Bundle, files: Sequence[Path], tokens: int | None, seed: int = 0) -> Data:
    """The streams of the files, of `tokens` tokens in all at most.

    A text is one stream, and so is each array of an .npz and each line of a .jsonl. Where there is more than `tokens`,
    each stream gives its share, a piece whose start the seed draws; one whose share is less than a token gives none.
    Raises DataError.
    """
    streams: list[Stream] = []
    sources: list[str] = []
    for file in files:
        for name, stream in _read(bundle, file):
            if len(stream):
                streams.append(stream)
                sources.append(name)
    if not streams:
        names = ", ".join(map(str, files)) or "no file"
        raise DataError(
            "data", "files with tokens", f"none in {names}", "give --data FILE with text of the model's kind"
        )
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
    """After so many positions every chunk and segment of the bundle has ended once, and every graph has run."""
    graphs = bundle.manifest.graphs
    return max(math.lcm(*(graph.stride for graph in graphs)), *(graph.tokens for graph in graphs))


def check_enough(bundle: Bundle, data: Data) -> None:
    """Raises DataError where there is too little to find ranges from."""
    period = period_of(bundle)
    longest = max(map(len, data.streams))
    unit = "vectors" if bundle.takes_vectors else "tokens"
    if data.tokens < LEAST_TOKENS:
        reason = f"at least {LEAST_TOKENS} {unit}, as ranges of fewer say little"
        raise DataError("data", reason, f"{data.tokens}", "give more data, or a larger --tokens")
    if longest < LEAST_PERIODS * period:
        least = f"{LEAST_PERIODS * period} {unit}, {LEAST_PERIODS} whole chunks and segments of {period}"
        reason = f"a stream of at least {least}, as ranges move while the memory learns"
        raise DataError("data", reason, f"{longest} in the longest", "give longer streams, or a larger --tokens")


def _read(bundle: Bundle, file: Path) -> Iterator[tuple[str, Stream]]:
    if file.suffix not in SUFFIXES:
        raise DataError("data", f"a file that ends in {', '.join(SUFFIXES)}", str(file), "give one of these kinds")
    if not file.is_file():
        got = "a folder" if file.is_dir() else "no such file"
        raise DataError("data", f"the file {file}", got, "check the path")
    if file.suffix == ".txt":
        yield str(file), _text(bundle, file)
    elif file.suffix == ".npz":
        yield from _arrays(bundle, file)
    else:
        yield from _lines(bundle, file)


def _text(bundle: Bundle, file: Path) -> Stream:
    if bundle.takes_vectors:
        raise DataError("data", "an .npz with vectors, which this bundle takes", f"the text {file}", "give an .npz")
    tokenizer = open_tokenizer(bundle.manifest.tokenizer, bundle.path)
    with file.open("rb") as opened:
        blocks = [block for block, _ in tokenizer.read(opened)]
    return _tokens(bundle, np.concatenate(blocks) if blocks else np.zeros(0, np.int32), str(file))


def _arrays(bundle: Bundle, file: Path) -> Iterator[tuple[str, Stream]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = [(name, archive[name]) for name in archive.files]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError("data", f"an .npz of plain arrays in {file}", str(error), "write it with numpy.savez") from None
    for name, value in found:
        where = f"{file}, array {name}"
        yield where, _vectors(bundle, value, where) if bundle.takes_vectors else _tokens(bundle, value, where)


def _lines(bundle: Bundle, file: Path) -> Iterator[tuple[str, Stream]]:
    if bundle.takes_vectors:
        raise DataError("data", "an .npz with vectors, which this bundle takes", str(file), "give an .npz")
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError("data", f"JSON in {where}", str(error), "mend the line") from None
            if isinstance(value, dict):
                value = value.get("tokens")
            if not isinstance(value, list):
                got = "none" if value is None else repr(value)[:40]
                remedy = 'write [1, 2] or {"tokens": [1, 2]}'
                raise DataError("data", f"a list of token ids in {where}", got, remedy)
            wrong = next((item for item in value if isinstance(item, bool) or not isinstance(item, int)), None)
            if wrong is not None or any(not -(2**63) <= item < 2**63 for item in value):
                got = repr(wrong)[:40] if wrong is not None else "one beyond 64 bits"
                raise DataError("data", f"integers as token ids in {where}", got, "mend the line")
            yield where, _tokens(bundle, np.asarray(value, np.int64), where)


def _tokens(bundle: Bundle, value: NDArray[Any], where: str) -> Stream:
    if value.dtype.kind not in "iu" or value.ndim != 1:
        got = f"{value.dtype} of shape {list(value.shape)}"
        raise DataError("data", f"a 1-D array of integers, token ids, in {where}", got, "give one array a stream")
    size = bundle.manifest.input.width
    outside = np.flatnonzero((value < 0) | (value >= size))
    if outside.size:
        first = int(outside[0])
        got = f"{value[first]} at {first}"
        raise DataError(
            "data", f"token ids from 0 to {size - 1} in {where}", got, "give data of this model's vocabulary"
        )
    return value.astype(np.int64)


def _vectors(bundle: Bundle, value: NDArray[Any], where: str) -> Stream:
    size = bundle.manifest.input.width
    if value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != size:
        got = f"{value.dtype} of shape {list(value.shape)}"
        raise DataError("data", f"floats of shape [T, {size}] in {where}", got, "give one array a stream")
    result = value.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(result).all(1))
    if bad.size:
        raise DataError("data", f"finite vectors in {where}", f"one that is not at {int(bad[0])}", "mend the data")
    return result
