"""State files, opened and verified by the runtime and split into fields by their own description."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import StateError, TitansError, UsageError
from ..files import replacing_file
from ..manifest import Entry, LayoutField, array, integer, string, word

MAGIC = b"TITANSE1"  # an encrypted state file begins with it
KEY_BYTES = 32

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SavedTensor(Entry):
    """The description of a tensor in a state file."""

    name: Annotated[str, string]
    dtype: Annotated[str, word(*DTYPES)]
    shape: Annotated[tuple[int, ...], array(integer(0))]
    role: Annotated[str, string]
    layout: Annotated[tuple[LayoutField, ...], array(LayoutField.from_json)] = ()
    operator: Annotated[str | None, string] = None


@dataclass(frozen=True)
class SavedState:
    """A verified state file.

    `metadata`: the file's metadata with JSON texts parsed. `entries`: the description of each state tensor. `tensors`:
    the tensors as stored, with a memory's rows packed, float32 (1, heads, R). `fields`: the memories' fields by name,
    such as "layers.1.memory.W0", float32 (1, heads, *shape).
    """

    path: Path
    bytes: int
    encrypted: bool
    position: int
    metadata: Mapping[str, Any]
    entries: tuple[SavedTensor, ...]
    tensors: Mapping[str, Array]
    fields: Mapping[str, Floats]

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, variant and weights_sha256 of the model that the state belongs to."""
        found: Mapping[str, Any] = self.metadata["model"]
        return found

    @property
    def learning(self) -> bool:
        """Whether the stream learned when it was saved."""
        return bool(self.metadata["learning"])

    def memories(self) -> list[str]:
        """The names of the memory tensors that have a layout, in the model's order."""
        return [entry.name for entry in self.entries if entry.role == "memory" and entry.layout]

    def layout(self, memory: str) -> tuple[LayoutField, ...]:
        """The fields of a memory's row."""
        return next(entry.layout for entry in self.entries if entry.name == memory)

    def operator(self, memory: str) -> str | None:
        """The operator that updates a memory, such as "NeuralMemory"; None if the file names none."""
        return next(entry.operator for entry in self.entries if entry.name == memory)

    def fields_of(self, memory: str, *kinds: str) -> list[str]:
        """The full names of a memory's fields of these kinds, in the row's order."""
        return [f"{memory}.{field.name}" for field in self.layout(memory) if field.kind in kinds]


def read_key(path: Path) -> bytes:
    """The key in a file: 32 bytes, or 64 hexadecimal digits. Raises StateError without any part of the key."""
    with path.open("rb") as file:
        raw = file.read(4096)
    if len(raw) == KEY_BYTES:
        return raw
    digits = raw.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", digits):
        return bytes.fromhex(digits.decode())
    got = "more" if len(raw) == 4096 else f"{len(raw)} other bytes"
    raise StateError(
        "E0406",
        "key",
        f"invalid key in {path}: expected {KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal digits, got {got}",
        f"make a key with: head -c {KEY_BYTES} /dev/urandom",
    )


def open_state(path: Path, key: bytes | None = None) -> SavedState:
    """The state in a file, decrypted with `key` if it is encrypted.

    Raises titans_runtime.Error for a damaged file or a wrong key, StateError if the description does not match the
    tensors, UsageError for an encrypted file without a key.
    """
    import titans_runtime

    encrypted = _is_encrypted(path)
    if encrypted and key is None:
        raise UsageError("E0406", "state", f"{path} is encrypted", "give --key-file FILE")
    state = titans_runtime.read_state(path, key=key if encrypted else None)
    try:
        metadata = {name: _parse(name, value) for name, value in state.metadata.items()}
        entries = tuple(SavedTensor.from_json(one, f"state[{at}]") for at, one in enumerate(metadata["state"]))
        _check(entries, state.tensors)
        if not isinstance(metadata["model"], dict) or not isinstance(metadata["learning"], bool):
            raise TypeError("model is not an object, or learning is not a boolean")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = error.problem if isinstance(error, TitansError) else str(error)
        detail = " ".join(what.split())[:200]
        raise StateError(
            "E0404", "state", f"invalid description of the tensors in {path}: {detail}", "save the stream again"
        ) from None
    return SavedState(
        path, path.stat().st_size, encrypted, state.position, metadata, entries, state.tensors, state.memory()
    )


def memory_arrays(state: SavedState) -> dict[str, Floats]:
    """Every field of the memories, float32 (1, heads, *shape), named as in `titans_runtime.Stream.memory`."""
    return {name: np.ascontiguousarray(values, np.float32) for name, values in state.fields.items()}


def write_npz(state: SavedState, target: Path) -> None:
    """Writes `memory_arrays` as an .npz, renamed into place atomically. Raises OutputError."""
    with replacing_file(target) as aside, aside.open("wb") as file:
        np.savez(file, **memory_arrays(state))  # type: ignore[arg-type]


def _is_encrypted(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


_JSON_METADATA = ("model", "memory", "state", "learning", "position")


def _parse(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON_METADATA and isinstance(value, str) else value


def _check(entries: tuple[SavedTensor, ...], tensors: Mapping[str, Array]) -> None:
    """Checks what the runtime has not checked when it compared the description with the tensors."""
    for entry in entries:
        shape = tensors[entry.name].shape
        if entry.role == "memory" and entry.layout and (len(shape) != 3 or min(shape) < 1):
            raise ValueError(f"{entry.name} has shape {list(shape)}")
