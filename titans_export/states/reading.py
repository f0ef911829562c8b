"""State files: opened and verified by the runtime, taken apart by what they say about themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TitansError, UsageError
from ..files import replacing_file

MAGIC = b"TITANSE1"  # an encrypted state file begins with it
KEY_BYTES = 32
BLOCK = 32  # elements along a row that share a scale, in int8 and fp8

# Fields of a packed row that together are a layer's W, and those that are its S (docs/operator.md).
WEIGHTS, SURPRISE = re.compile(r"W\d+|gamma"), re.compile(r"S\d+|S_gamma")

Array = NDArray[Any]
Floats = NDArray[np.float32]


class StateError(TitansError):
    """A state file that is damaged, foreign or not what the command needs."""


@dataclass(frozen=True)
class SavedState:
    """A state file whose hash was right.

    `facts` is its metadata with JSON texts parsed, `entries` the description of each state tensor (name, role, dtype,
    shape and, of memories, layout), `tensors` the tensors as stored (a memory's rows packed, float32 (1, heads, R)) and
    `fields` the memories' fields by name, such as "layers.1.memory.W0", float32 (1, heads, *shape).
    """

    path: Path
    bytes: int
    encrypted: bool
    position: int
    facts: Mapping[str, Any]
    entries: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Array]
    fields: Mapping[str, Floats]

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, variant and weights_sha256 of the model that the state belongs to."""
        found: Mapping[str, Any] = self.facts["model"]
        return found

    @property
    def learning(self) -> bool:
        """Whether the stream learned when it was saved."""
        return bool(self.facts["learning"])

    def memories(self) -> list[str]:
        """The names of the tensors that hold W and S and say where, in the model's order."""
        return [entry["name"] for entry in self.entries if entry["role"] == "memory" and entry.get("layout")]

    def layout(self, memory: str) -> list[Mapping[str, Any]]:
        """Name, offset in words, shape and, where it is not float32, dtype of each field of a memory's row."""
        found: list[Mapping[str, Any]] = next(entry["layout"] for entry in self.entries if entry["name"] == memory)
        return found


def read_key(path: Path) -> bytes:
    """The key in a file: 32 bytes as they are, or 64 hexadecimal digits. Raises StateError, which shows none of it."""
    with path.open("rb") as file:
        raw = file.read(4096)
    if len(raw) == KEY_BYTES:
        return raw
    digits = raw.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", digits):
        return bytes.fromhex(digits.decode())
    got = "more" if len(raw) == 4096 else f"{len(raw)} bytes of another kind"
    remedy = f"make one with: head -c {KEY_BYTES} /dev/urandom"
    raise StateError("key", f"{KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal digits in {path}", got, remedy)


def open_state(path: Path, key: bytes | None = None) -> SavedState:
    """The state in a file, decrypted with `key` where it is encrypted; a plain file needs none and ignores it.

    Raises titans_runtime.Error for a file that is damaged, foreign or not to be decrypted, StateError for one that does
    not describe its own tensors, UsageError for an encrypted one without a key.
    """
    import titans_runtime

    encrypted = _is_encrypted(path)
    if encrypted and key is None:
        raise UsageError("state", f"a key for {path}, which is encrypted", "none", "give --key-file FILE")
    state = titans_runtime.read_state(path, key=key if encrypted else None)
    try:
        facts = {name: _parse(name, value) for name, value in state.metadata.items()}
        entries = tuple(facts["state"])
        _check(entries, state.tensors)
        if not isinstance(facts["model"], dict) or not isinstance(facts["learning"], bool):
            raise TypeError("a model that is an object, and learning that is true or false")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = " ".join(str(error).split())[:200]
        raise StateError("state", f"{path} to describe its tensors", f"a fault at {what}", "save it again") from None
    return SavedState(
        path, path.stat().st_size, encrypted, state.position, facts, entries, state.tensors, state.memory()
    )


def memory_arrays(state: SavedState) -> dict[str, Floats]:
    """Every field of the memories, float32 (1, heads, *shape), under the names of `titans_runtime.Stream.memory`."""
    return {name: np.ascontiguousarray(values, np.float32) for name, values in state.fields.items()}


def write_npz(state: SavedState, target: Path) -> None:
    """Writes `memory_arrays` as an .npz, which takes its name when it is whole. Raises OutputError."""
    with replacing_file(target) as aside, aside.open("wb") as file:
        np.savez(file, **memory_arrays(state))  # type: ignore[arg-type]


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a field; a vector is one row."""
    rows, columns = (1, 1, *shape)[-2:]
    return rows, columns


def _is_encrypted(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


_JSON_FACTS = ("model", "memory", "state", "learning", "position")


def _parse(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON_FACTS and isinstance(value, str) else value


def _check(entries: tuple[Any, ...], tensors: Mapping[str, Array]) -> None:
    """What the code here relies on beyond the runtime, which has compared the description with the tensors."""
    for entry in entries:
        shape = tensors[entry["name"]].shape
        if entry["role"] == "memory" and entry.get("layout") and (len(shape) != 3 or min(shape) < 1):
            raise ValueError(f"{entry['name']}, of shape {list(shape)}")
