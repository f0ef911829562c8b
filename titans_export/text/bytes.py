"""The tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from titans_runtime._decoding import Decode, byte_decoder

from .base import BLOCK_BYTES, Tokens, check_tokens


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
        return byte_decoder()
