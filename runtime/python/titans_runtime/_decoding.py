"""Text from tokens, one token at a time: all pieces together are the decoding of all tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

# A part of a tokenizer.json.
Spec: TypeAlias = Mapping[str, Any]
# From one token to the text that no later token changes; None returns the rest.
Decode: TypeAlias = Callable[[int | None], str]

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of byte fallback


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def flat(spec: Spec | None, parts: str) -> Iterator[Spec]:
    """The members of nested sequences."""
    if spec is None:
        return
    if spec["type"] == "Sequence":
        for part in spec[parts]:
            yield from flat(part, parts)
    else:
        yield spec


_BYTES = {char: byte for byte, char in byte_characters().items()}
_LOCAL = ("ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Fuse", "Strip", "Replace")


def byte_decoder() -> Decode:
    """Holds back incomplete UTF-8, and gives U+FFFD for invalid bytes and tokens above 255."""
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


class StreamDecoder:
    """The `Decode` of a tokenizer of the package `tokenizers`. spec: the part `decoder` of its file.

    Decodes each token together with the tokens before it whose text is known, so that it takes constant memory.
    """

    def __init__(self, tokenizer: Any, spec: Spec | None, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        decoders = list(flat(spec, "decoders"))
        kinds = {decoder["type"] for decoder in decoders}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._streams = _streams(decoders)
        self._ids: list[int] = []
        self._known, self._shown = 0, ""  # tokens whose text has been returned, and that text

    def __call__(self, token: int | None) -> str:
        """The text that is complete with this token."""
        if token is None:
            text = self._decode(self._ids)
            return text[len(self._shown) :]
        name = self._tokenizer.id_to_token(token)
        if name is None or (self._skip and token in self._special):
            return ""
        self._ids.append(token)
        if not self._complete(name):
            return ""
        text = self._decode(self._ids)
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        context = self._ids[self._known :]
        if (shown := self._decode(context)) or not text:  # a decoder may strip the start, and has done so here
            self._ids, self._shown = context, shown
        else:
            self._shown = text
        self._known = len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _complete(self, name: str) -> bool:
        """Whether no later token changes the text up to this one."""
        if not self._streams or (self._byte_fallback and _BYTE.fullmatch(name)):
            return False
        if self._utf8 is None:
            return True
        known = all(char in _BYTES for char in name)
        self._utf8.decode(bytes(_BYTES[char] for char in name) if known else name.encode())
        return not self._utf8.getstate()[0]


def _streams(decoders: list[Spec]) -> bool:
    """Whether text is decoded token by token; otherwise all of it is returned at the end."""
    fused = False
    for decoder in decoders:
        kind = decoder["type"]
        if kind not in _LOCAL or (kind == "Strip" and fused and decoder["stop"]):
            return False
        if kind == "Replace" and fused and len(decoder["pattern"].get("String", "")) != 1:
            return False
        fused |= kind in ("Fuse", "ByteLevel")
    return True
