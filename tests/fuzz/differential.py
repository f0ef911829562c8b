"""Compares the runtime's readers with those of Python: json, safetensors, protobuf, and titans_export's own.

    .venv/bin/python tests/fuzz/differential.py BUILD/tests/fuzz/titans_readings SECONDS [FINDINGS]

Changed JSON texts, safetensors files and ONNX graphs go to both sides. Whatever the runtime accepts, the libraries
must read alike, and titans_export's readers must decide as the runtime does. If not, the exit code is 1 and the inputs
are in FINDINGS.
"""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, EncodeError
from onnx import load_model_from_string
from safetensors import SafetensorError, deserialize

from titans_export import strict_json
from titans_export.errors import BundleError
from titans_export.onnx.encoding import parse_model

CORPUS = Path(__file__).resolve().parent / "corpus"
# Pieces that readers are known to understand differently.
PIECES = [
    b"-0", b"-0.0", b"1e999", b"1E400", b"NaN", b"Infinity", b"18446744073709551615", b"18446744073709551616",
    b"-9223372036854775808", b"-9223372036854775809", b"9007199254740993", b"0.1e1", b"01", b"1.", b".5", b"+1",
    b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"\\u202e"', b'"\\/"', b'"\x7f"', "\u200b".encode(),
    "\ufeff".encode(), b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0", b"\t", b"\r\n", b"\x0b",
    b"//", b"/**/", b",", b"{}", b"[]", b'"', b"\\", b'{"a":1,"a":2}', b"[[[[[[[[", b"null", b"true", b"'", b"1e5",
    b'"__metadata__":{"a":"b"},', b'"dtype":"F32",', b'"F8_E4M3"', b'"BOOL"', b'"I64"', b"[0,0]", b"[0,4]", b"[-1]",
    b"4294967296", b"2.0", b"\x80\x00", b"\x88\x80\x80\x80\x10", b"\x08\x00", b"\x0a\x00", b"\xf8\x3f\x01",
]  # fmt: skip
Side = tuple[bool, Any]  # whether it is accepted, and what was read


class Runtime:
    """The program that reads as the runtime does."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self, kind: str, content: bytes) -> Side:
        """Raises RuntimeError if the program has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(kind.encode() + struct.pack("<I", len(content)) + content)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the runtime's reader has ended")
        return line.startswith(b"+"), line[1:].rstrip(b"\n").decode()


def same(a: Any, b: Any) -> bool:
    """Equal with types: True is not 1, and 1 is not 1.0."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def compare_json(content: bytes, ours: Side) -> str | None:
    """What differs, None if nothing does. The runtime reads objects only."""
    try:
        strict: Side = True, strict_json.loads(content)
    except ValueError:
        strict = False, None
    if strict[0] and not isinstance(strict[1], dict):
        strict = False, None
    if ours[0] != strict[0]:
        return f"the runtime {'accepts' if ours[0] else 'refuses'} it, titans_export does not"
    if not ours[0]:
        return None
    value, other = json.loads(ours[1]), json.loads(content)
    return None if same(value, other) and same(strict[1], other) else f"read as {ours[1][:200]}"


def compare_safetensors(content: bytes, ours: Side) -> str | None:
    """What the runtime accepts, the library reads alike. The runtime accepts less: no unknown dtypes, for example."""
    if not ours[0]:
        return None
    try:
        theirs = {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in deserialize(content)}
    except SafetensorError as error:
        return f"safetensors refuses it: {error}"
    read = json.loads(ours[1])
    found = {name: (one[0], one[1], content[one[2] : one[2] + one[3]]) for name, one in read.items()}
    return None if found == theirs else f"read as {ours[1][:200]}"


def compare_graph(content: bytes, ours: Side) -> str | None:
    """Both sides accept only the one encoding that protobuf writes."""
    try:
        parse_model(content, "graph.onnx")
        strict = True
    except BundleError:
        strict = False
    if ours[0] != strict:
        return f"the runtime {'accepts' if ours[0] else 'refuses'} it, titans_export does not"
    if ours[0]:
        try:
            if load_model_from_string(content).SerializeToString() != content:
                return "protobuf writes it differently"
        except (DecodeError, EncodeError, UnicodeDecodeError) as error:
            return f"protobuf refuses it: {error}"
    return None


def change(content: bytes, draw: random.Random) -> bytes:
    """The content with a few random changes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        action = draw.randrange(6)
        if action == 0:
            changed[at:at] = draw.choice(PIECES)
        elif action == 1:
            changed[at : at + draw.randrange(1, 12)] = draw.choice(PIECES)
        elif action == 2:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif action == 3:
            del changed[at : at + draw.randrange(1, 20)]
        elif action == 4:
            start = draw.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + draw.randrange(1, 40)]
        else:
            _replace_number(changed, draw)
    return bytes(changed)


def _replace_number(changed: bytearray, draw: random.Random) -> None:
    places = [index for index, byte in enumerate(changed) if 48 <= byte <= 57]
    if places:
        at = draw.choice(places)
        changed[at : at + 1] = draw.choice(PIECES[:14])


def _header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with a changed header, whose length is mostly right."""
    size = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + size], draw)
    length = len(header) if draw.random() < 0.9 else draw.choice((0, 1, len(header) + 1, 1 << 40, (1 << 64) - 1))
    data = content[8 + size :] if draw.random() < 0.8 else change(content[8 + size :], draw)
    return length.to_bytes(8, "little") + header + data


Change = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, tuple[str, Change, Callable[[bytes, Side], str | None]]] = {
    "j": ("manifest", change, compare_json),
    "s": ("safetensors", _header, compare_safetensors),
    "o": ("onnx", change, compare_graph),
}


def run(program: str, seconds: float, findings: Path | None = None, seed: int = 0) -> tuple[int, int, list[str]]:
    """Numbers of inputs and of those that the runtime accepts, and what was found."""
    draw, runtime = random.Random(seed), Runtime(program)
    seeds = {
        kind: [path.read_bytes() for path in sorted((CORPUS / name).iterdir())] for kind, (name, *_) in KINDS.items()
    }
    seeds["j"] += [json.dumps({"a": [1, -2, 0.5, True, None, "é"], "b": {"c": {}}}).encode(), b'{"a": 1}', b"{}"]
    inputs = accepted = 0
    found: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(found) < 10:
        kind = draw.choice("jso")
        _, changing, comparing = KINDS[kind]
        original = draw.choice(seeds[kind])
        content = original if inputs < 30 else changing(original, draw)
        ours = runtime.read(kind, content)
        inputs += 1
        accepted += ours[0]
        if (problem := comparing(content, ours)) is None:
            continue
        found.append(f"{KINDS[kind][0]}: {problem}: {content[:300]!r}")
        if findings is not None:
            findings.mkdir(parents=True, exist_ok=True)
            (findings / f"differential-{KINDS[kind][0]}-{len(found)}").write_bytes(content)
    return inputs, accepted, found


def main() -> int:
    findings = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    inputs, accepted, found = run(sys.argv[1], float(sys.argv[2]), findings, seed=int(time.time()))
    for line in found:
        print(f"[fuzz] differential: {line}")
    print(f"[fuzz] differential: {'FAILED' if found else 'ok'}, {inputs} inputs, {accepted} accepted")
    return int(bool(found) or inputs < 100)


if __name__ == "__main__":
    sys.exit(main())
