"""Text in and out of a stream: bytes, or the bundle's tokenizer.json by the package `tokenizers`."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._library import UNSUPPORTED, failure, invalid

Ids = npt.NDArray[np.int32]


class Decoder(Protocol):
    """Turns tokens into text one by one. Text appears once no later token can change it."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Codec(Protocol):
    """Encodes whole texts, and makes decoders."""

    def encode(self, text: str) -> Ids: ...

    def decoder(self) -> Decoder: ...


class _Bytes:
    """Tokens are the bytes of UTF-8. A byte that is not UTF-8 becomes U+FFFD."""

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def decoder(self) -> Decoder:
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token]) if token < 256 else b"\xff")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


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

    def decoder(self) -> Decoder:
        return _FileDecoder(self._tokenizer)


class _FileDecoder:
    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        self._held.clear()
        return str(piece)

    def finish(self) -> str:
        """The tokens that did not become text, such as an incomplete character."""
        return str(self._tokenizer.decode(self._held, skip_special_tokens=False)) if self._held else ""


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


def pieces(tokens: Iterable[int], decoder: Decoder, stop: Sequence[str]) -> Iterator[str]:
    """The text of the tokens as it comes, up to the end of the first stop text."""
    tail, longest = "", max(map(len, stop), default=0)
    for token in tokens:
        piece, ended = _until(tail, decoder.push(token), stop)
        tail = (tail + piece)[-longest:] if longest else ""
        if piece:
            yield piece
        if ended:
            return
    piece, _ = _until(tail, decoder.finish(), stop)
    if piece:
        yield piece


def _until(tail: str, piece: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The part of the piece up to the end of the first stop text, and whether there was one. tail: the text before."""
    whole = tail + piece
    found = ((whole.find(text, max(0, len(tail) - len(text) + 1)), len(text)) for text in stop)
    ends = [at + length for at, length in found if at >= 0]
    return (whole[len(tail) : min(ends)], True) if ends else (piece, False)
