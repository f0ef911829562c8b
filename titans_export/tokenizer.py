"""Tokenizers of a bundle: bytes, or a tokenizer file of the `tokenizers` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest as records
from .errors import BundleError
from .text.base import EmptyTextError, TextError, Tokenizer, Tokens
from .text.bytes import ByteTokenizer
from .text.file import FileTokenizer
from .text.files import open_text, read_tokens

__all__ = [
    "ByteTokenizer",
    "EmptyTextError",
    "FileTokenizer",
    "TextError",
    "Tokenizer",
    "Tokens",
    "open_text",
    "open_tokenizer",
    "read_tokens",
]


def open_tokenizer(
    description: records.Tokenizer | Mapping[str, Any] | None,
    bundle: Path,
    vocab_size: int | None = None,
    encoding_errors: str = "strict",
) -> Tokenizer:
    """The tokenizer of a manifest's `tokenizer`, typed or as a session's `info` has it; bytes for None.

    With `vocab_size`, text whose tokens the model does not have raises TextError. `encoding_errors` is "strict" or
    "replace": what a tokenizer file does with bytes that are not UTF-8. Raises BundleError, MachineError.
    """
    if not isinstance(description, records.Tokenizer):
        description = records.Tokenizer.from_json(description or {"kind": "bytes"}, "tokenizer")
    kind = description.kind
    if kind == "bytes":
        return ByteTokenizer(vocab_size)
    if kind == "file":
        return FileTokenizer(bundle / str(description.file), vocab_size, encoding_errors)
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
