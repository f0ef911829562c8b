"""The tokenizer whose tokens are bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from .base import BLOCK_BYTES, Decode, Tokens, check_tokens


class ByteTokenizer:
    """A token is a byte. Every byte passes unchanged, whatever the encoding of the text."""

    whole_text_reason = None

    def __init__(self, vocab_size: int | None = None) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: bytes) -> Tokens:
        """The bytes."""
        tokens = np.frombuffer(text, np.uint8).astype(np.int32)
        return check_tokens(tokens, self._vocab_size, lambda token: f"byte 0x{token:02x}")

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens in blocks, so that a file of any size takes constant memory."""
        while block := file.read(BLOCK_BYTES):
            yield self.encode(block), len(block)

    def decoder(self, skip_special_tokens: bool = False) -> Decode:
        """Holds back incomplete UTF-8, and shows invalid bytes and tokens above 255 as U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def decode(token: int | None) -> str:
            if token is None:
                return utf8.decode(b"", final=True)
            if not 0 <= token < 256:
                rest = utf8.decode(b"", final=True)
                utf8.reset()
                return rest + "\ufffd"
            return utf8.decode(bytes([token]))

        return decode
