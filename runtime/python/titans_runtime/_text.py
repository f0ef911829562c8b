"""Text in and out of a stream: bytes, or the bundle's tokenizer.json by the package `tokenizers`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._decoding import Decode, StreamDecoder, byte_decoder
from ._library import UNSUPPORTED, failure, invalid

Ids = npt.NDArray[np.int32]


class Codec(Protocol):
    """Encodes whole texts, and makes decoders."""

    def encode(self, text: str) -> Ids: ...

    def decoder(self) -> Decode: ...


class _Bytes:
    """Tokens are the bytes of UTF-8."""

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def decoder(self) -> Decode:
        return byte_decoder()


class _File:
    """The tokens that the package gives for a whole text, without special tokens around it."""

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            problem = "cannot import tokenizers, which this bundle's tokenizer.json needs"
            raise failure("E1006", "packages", problem, "pip install tokenizers", UNSUPPORTED) from None
        self._tokenizer = Tokenizer.from_file(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> Ids:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decoder(self) -> Decode:
        return StreamDecoder(self._tokenizer, json.loads(self._tokenizer.to_str()).get("decoder"), False)


class TextSource:
    """The codec of a bundle, opened at its first use. description: a session's ``info["tokenizer"]``."""

    def __init__(self, description: Mapping[str, Any] | None, folder: str) -> None:
        self._description, self._folder = description or {"kind": "bytes"}, folder
        self._codec: Codec | None = None

    def codec(self) -> Codec:
        """The codec. Raises Error if the bundle has none, or if the package is missing."""
        if self._codec is None:
            self._codec = self._open()
        return self._codec

    def _open(self) -> Codec:
        kind = self._description["kind"]
        if kind == "bytes":
            return _Bytes()
        if kind == "file":
            return _File(os.path.join(self._folder, self._description["file"]))
        raise invalid("E0110", "tokenizer", "this bundle has no tokenizer", "feed token ids")


def pieces(tokens: Iterable[int], decode: Decode, stop: Sequence[str]) -> Iterator[str]:
    """The text of the tokens as it comes, up to the end of the first stop text."""
    tail, longest = "", max(map(len, stop), default=0)
    for token in tokens:
        piece, ended = _until(tail, decode(token), stop)
        tail = (tail + piece)[-longest:] if longest else ""
        if piece:
            yield piece
        if ended:
            return
    piece, _ = _until(tail, decode(None), stop)
    if piece:
        yield piece


def _until(tail: str, piece: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The part of the piece up to the end of the first stop text, and whether there was one. tail: the text before."""
    whole = tail + piece
    found = ((whole.find(text, max(0, len(tail) - len(text) + 1)), len(text)) for text in stop)
    ends = [at + length for at, length in found if at >= 0]
    return (whole[len(tail) : min(ends)], True) if ends else (piece, False)
