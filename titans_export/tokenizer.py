"""Tokenizers of a bundle: bytes, or a tokenizer file of the `tokenizers` package."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from . import manifest as records
from .errors import BundleError, MachineError, TitansError

Tokens = npt.NDArray[np.int32]
BLOCK_BYTES = 1 << 12


class TextError(TitansError, ValueError):
    """Text that is empty or that the model's tokenizer cannot read."""


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a whole text."""

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens of a file in blocks, each with the number of bytes it covers."""

    def decoder(self) -> Callable[[int | None], str]:
        """A function from one token to the text that is complete by then; None returns the rest."""


class ByteTokenizer:
    """A token is a byte."""

    def encode(self, text: bytes) -> Tokens:
        """The bytes."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens in blocks, so that a file of any size takes constant memory."""
        while block := file.read(BLOCK_BYTES):
            yield self.encode(block), len(block)

    def decoder(self) -> Callable[[int | None], str]:
        """Holds back incomplete UTF-8 and shows invalid bytes as U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def decode(token: int | None) -> str:
            return utf8.decode(b"", final=True) if token is None else utf8.decode(bytes([token & 0xFF]))

        return decode


class FileTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` package. No special tokens are added."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
            from tokenizers.decoders import DecodeStream
        except ImportError as error:
            raise MachineError(
                "E1006",
                "tokenizer",
                f"cannot import tokenizers, needed for {path.name}: {error}",
                "pip install tokenizers",
            ) from None
        try:
            self._inner: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise BundleError(
                "E0204", "tokenizer", f"damaged file {path}: {error}", "export the bundle again"
            ) from None
        self._stream = DecodeStream

    def encode(self, text: bytes) -> Tokens:
        """The tokens of UTF-8 text."""
        return self._encode(_utf8(text))

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens in blocks of whole lines, as words do not cross lines; a longer line is one block."""
        rest = b""
        while block := file.read(BLOCK_BYTES):
            whole, found, tail = (rest + block).rpartition(b"\n")
            rest = tail
            if found:
                yield self._encode(_utf8(whole + found)), len(whole) + 1
        if rest:
            yield self._encode(_utf8(rest)), len(rest)

    def decoder(self) -> Callable[[int | None], str]:
        """The package's own stream decoding, which holds back text that the next token may change."""
        stream = self._stream(skip_special_tokens=False)
        ids: list[int] = []
        shown = 0

        def decode(token: int | None) -> str:
            nonlocal shown
            if token is None:
                whole: str = self._inner.decode(ids, skip_special_tokens=False)
                return whole[shown:]
            ids.append(token)
            piece: str = stream.step(self._inner, token) or ""
            shown += len(piece)
            return piece

        return decode

    def _encode(self, text: str) -> Tokens:
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)


def open_tokenizer(description: records.Tokenizer | Mapping[str, Any] | None, bundle: Path) -> Tokenizer:
    """The tokenizer of a manifest's `tokenizer`, typed or as a session's `info` has it; bytes for None.

    Raises BundleError, MachineError.
    """
    if not isinstance(description, records.Tokenizer):
        description = records.Tokenizer.from_json(description or {"kind": "bytes"}, "tokenizer")
    kind = description.kind
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "file":
        return FileTokenizer(bundle / str(description.file))
    if kind == "none":
        raise BundleError(
            "E0110", "tokenizer", f"{bundle} has no tokenizer", "export with a tokenizer.json in the checkpoint"
        )
    raise BundleError(
        "E0205",
        "tokenizer",
        f'invalid tokenizer kind in the manifest: expected "bytes", "file" or "none", got {kind!r}',
        "export the bundle again",
    )


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError("E0108", "text", f"the text is not UTF-8: {error}", "convert the text to UTF-8") from None
