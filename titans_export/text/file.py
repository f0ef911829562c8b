"""The tokenizer of a `tokenizer.json`, run by the `tokenizers` package."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from titans_runtime._decoding import Decode, Spec, StreamDecoder

from ..errors import BundleError, MachineError
from .base import BLOCK_BYTES, TextError, Tokens, check_tokens
from .cuts import SafeCuts, may_precede, stands_alone
from .patterns import Unsupported

_FIX = "export the bundle again"


class _Guard(NamedTuple):
    """A safe cut between two characters, and the tokens that they add beside a block.

    left: tokens of "a" and the left character; right: tokens of the right character and "a".
    """

    pair: str
    left: tuple[int, ...]
    right: tuple[int, ...]


class _Utf8:
    """The text of a file. A byte order mark at its start is dropped; with "replace", invalid bytes are surrogates."""

    def __init__(self, file: BinaryIO, errors: str) -> None:
        self._file = file
        self._start = file.read(len(codecs.BOM_UTF8))
        self._dropped = len(self._start) if self._start == codecs.BOM_UTF8 else 0
        self._next, self._position = self._start[self._dropped :], self._dropped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if errors == "replace" else "strict")
        self._ended = False

    def read(self, size: int) -> str:
        """Some text, empty at the end. Raises TextError."""
        text = ""
        while not text and not self._ended:
            block, self._next = self._next + self._file.read(size), b""
            self._ended = not block
            pending = len(self._utf8.getstate()[0])
            try:
                text = self._utf8.decode(block, final=self._ended)
            except UnicodeDecodeError as error:
                raise _not_utf8(self._start, self._position - pending + error.start, error.reason) from None
            self._position += len(block)
        return text

    def read_all(self) -> str:
        """All text. Raises TextError."""
        return "".join(iter(lambda: self.read(1 << 20), ""))

    def covered(self, text: str) -> int:
        """The bytes that the text was read from, the first time with the byte order mark."""
        dropped, self._dropped = self._dropped, 0
        return len(_raw(text)) + dropped


class FileTokenizer:
    """A `tokenizer.json`. No special tokens are added, and nothing is truncated or padded: a stream has no end.

    Text is UTF-8. A byte order mark at the start is dropped. `encoding_errors` is "strict", or "replace" to read
    U+FFFD for invalid bytes.
    """

    def __init__(self, path: Path, vocab_size: int | None = None, encoding_errors: str = "strict") -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MachineError(
                "E1006",
                "tokenizer",
                f"cannot import tokenizers, needed for {path.name}: {error}",
                "pip install tokenizers",
            ) from None
        try:
            self._spec: Spec = json.loads(path.read_bytes())
            # Offsets of a post-processor are trimmed, and a stream is neither truncated nor padded.
            plain = {**self._spec, "truncation": None, "padding": None, "post_processor": None}
            self._inner: Any = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except (OSError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises nothing narrower, and panics are no Exception
            raise BundleError("E0204", "tokenizer", f"damaged file {path}: {error}", _FIX) from None
        self._vocab_size, self._errors = vocab_size, encoding_errors
        self._guards: dict[str, _Guard | None] = {}

    def encode(self, text: bytes) -> Tokens:
        """The tokens of UTF-8 text."""
        try:
            decoded = text.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(text, error.start, error.reason) from None
        return self._tokens(self._ids(decoded.removeprefix("\ufeff")))

    def read(self, file: BinaryIO) -> Iterator[tuple[Tokens, int]]:
        """The tokens of the whole text, in blocks that end at safe cuts.

        Holds one block in memory, or as much text as has no safe cut.
        """
        source = _Utf8(file, self._errors)
        if self.whole_text_reason:
            if text := source.read_all():
                yield self._block(text, None, None), source.covered(text)
            return
        held, left, scanned = "", None, 0  # text not yet encoded, the cut before it, and where the search goes on
        while more := source.read(max(BLOCK_BYTES, len(held))):
            held += more
            found = self._last_cut(held, scanned)
            scanned = len(held)
            if found:
                at, right = found
                yield self._block(held[:at], left, right), source.covered(held[:at])
                held, left, scanned = held[at:], right, 0
        if held:
            yield self._block(held, left, None), source.covered(held)

    def decoder(self, skip_special_tokens: bool = False) -> Decode:
        """Holds back text that the next token may change."""
        return StreamDecoder(self._inner, self._spec.get("decoder"), skip_special_tokens)

    @cached_property
    def whole_text_reason(self) -> str | None:
        """Why `read` holds a whole text in memory, None if it reads in constant memory."""
        try:
            self._cuts = SafeCuts(self._spec, self._normalize)
        except (Unsupported, KeyError, TypeError, AttributeError) as error:
            return str(error)
        return None

    def _last_cut(self, text: str, scanned: int) -> tuple[int, _Guard] | None:
        """The last safe cut that is not before `scanned`."""
        for at in range(len(text) - 2, max(scanned - 2, 1), -1):
            guard = self._guard(text[at - 1 : at + 1])
            if guard and may_precede(text[at - 2]) and stands_alone(text[at + 1]):
                return at, guard
        return None

    def _guard(self, pair: str) -> _Guard | None:
        if pair not in self._guards:
            self._guards[pair] = self._find_guard(pair) if self._cuts.safe(pair) else None
        return self._guards[pair]

    def _find_guard(self, pair: str) -> _Guard | None:
        """The tokens beside a cut, None if they are not apart."""
        encoding = self._inner.encode(f"a{pair}a", add_special_tokens=False)
        count = sum(start < 2 for start, _ in encoding.offsets)
        left, right = tuple(encoding.ids[:count]), tuple(encoding.ids[count:])
        apart = all(end <= 2 for _, end in encoding.offsets[:count]) and self._ids(f"a{pair[0]}") == list(left)
        return _Guard(pair, left, right) if apart else None

    def _block(self, text: str, left: _Guard | None, right: _Guard | None) -> Tokens:
        """The tokens of a block between two safe cuts: of the block with its neighbours, less those of the neighbours.

        The neighbours keep steps away from the block that change the ends of a text only.
        """
        before, after = left.left if left else (), right.right if right else ()
        text = _raw(text).decode("utf-8", "replace") if self._errors == "replace" else text
        whole = (f"a{left.pair[0]}" if left else "") + text + (f"{right.pair[1]}a" if right else "")
        ids = self._ids(whole)
        end = len(ids) - len(after)
        if tuple(ids[: len(before)]) != before or tuple(ids[end:]) != after:
            raise AssertionError(f"the tokenizer is not cut safely between {left} and {right}")
        return self._tokens(ids[len(before) : end])

    def _ids(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise BundleError("E0204", "tokenizer", f"the tokenizer fails: {error}", _FIX) from None
        return ids

    def _tokens(self, ids: list[int]) -> Tokens:
        return check_tokens(np.asarray(ids, np.int32), self._vocab_size, lambda token: repr(self._name(token)))

    def _name(self, token: int) -> str:
        return str(self._inner.id_to_token(token))

    def _normalize(self, spec: Spec, text: str) -> str:
        """The text after one normaliser of the file."""
        normalised: str = _normalizer(json.dumps(spec)).normalize_str(text)
        return normalised


_NORMALIZERS: dict[str, Any] = {}


def _normalizer(spec: str) -> Any:
    if spec not in _NORMALIZERS:
        import tokenizers

        model: Mapping[str, Any] = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
        empty = {"version": "1.0", "added_tokens": [], "normalizer": json.loads(spec), "model": model}
        _NORMALIZERS[spec] = tokenizers.Tokenizer.from_str(json.dumps(empty)).normalizer
    return _NORMALIZERS[spec]


def _raw(text: str) -> bytes:
    """The bytes that the text was read from."""
    return text.encode("utf-8", "surrogateescape")


def _not_utf8(start: bytes, offset: int, reason: str) -> TextError:
    """An error for text that is not UTF-8. start: the first bytes of the text."""
    encoding = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}.get(start[:2])
    seems = f"; its byte order mark is that of {encoding}" if encoding else ""
    return TextError(
        "E0108",
        "text",
        f"the text is not UTF-8 at byte {offset}: {reason}{seems}",
        "convert the text to UTF-8, or read it with --encoding-errors replace",
    )
