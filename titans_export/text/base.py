"""What every tokenizer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from titans_runtime._decoding import Decode

from ..errors import TitansError

Tokens = npt.NDArray[np.int32]
BLOCK_BYTES = 1 << 12


class TextError(TitansError, ValueError):
    """Text that is empty or that the model's tokenizer cannot read."""


class EmptyTextError(TextError):
    """Text without a token."""


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a whole text. Raises TextError."""

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens of a file in blocks, each with the number of bytes it covers. Raises TextError.

        All blocks together hold the tokens of the whole text.
        """

    def decoder(self, skip_special_tokens: bool = False) -> Decode:
        """A function from one token to the text that is complete by then; None returns the rest."""

    @property
    def whole_text_reason(self) -> str | None:
        """Why `read` holds a whole text in memory, None if it reads in constant memory."""


def check_tokens(tokens: Tokens, vocab_size: int | None, name: Callable[[int], str]) -> Tokens:
    """The tokens. Raises TextError if one is beyond the model's vocabulary."""
    if vocab_size is not None and len(tokens) and (most := int(tokens.max())) >= vocab_size:
        first = int(tokens[tokens >= vocab_size][0])
        raise TextError(
            "E0109",
            "text",
            f"token out of range: expected 0 to {vocab_size - 1}, got {first} ({name(first)}), up to {most}",
            "remove that text, or export the bundle with the tokenizer that the model was trained with",
        )
    return tokens
