"""Weights at any path that a trainer leaves, as named tensors: files, shards, folders, wrapped state dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, MissingCheckpointError
from ...named_tensors import NamedTensors, TensorEntry
from .folders import find_weights
from .naming import choose, find_state_dicts, plain_values, split, strip_prefixes
from .pickled import read_pickle
from .safetensors import read_safetensors
from .shards import check_names, files_of, read_index

_BLOCK = 1 << 22
_MOST_MAPPED = 1 << 27  # bytes
_MOST_REPEATED = 1 << 12  # bytes of a tensor per byte of its file: a tensor may repeat elements, for example over heads
_HEADER_LENGTH = 8  # bytes before the JSON of a safetensors file


@dataclass(frozen=True)
class Weights:
    """A model's tensors, as saved, and where they came from.

    tensors: read at each access. extras: plain values beside the state dict. address: of the state dict, None where
    the file has only one. found: the addresses of all. removed: the prefix that all names had.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: NamedTensors
    extras: Mapping[str, Any]
    sha256: str
    address: str | None
    found: tuple[str, ...]
    removed: str
    notes: tuple[str, ...]
    pickles: tuple[_Pickle, ...] = ()

    def release(self) -> None:
        """Frees what was read. Tensors can still be read."""
        for pickled in self.pickles:
            pickled.release()

    def beside(self, name: str) -> Path | None:
        """The file of that name in the given folder or beside the weights, or None."""
        folders = [self.path if self.path.is_dir() else self.path.parent, self.files[0].parent]
        return next((folder / name for folder in folders if (folder / name).is_file()), None)


class _Pickle:
    """The state dicts of a file of torch.save. Dropped after loading, and read again if asked for again.

    A mapping keeps the pages that were read in memory. So a mapped file is mapped again every `_MOST_MAPPED` bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size
        self._read = 0  # bytes of tensors, since it was mapped
        with path.open("rb") as file:
            self._mapped = file.read(2) == b"PK"
        loaded = read_pickle(path)
        self._found: dict[str, dict[str, Any]] | None = find_state_dicts(loaded)
        self.extras = plain_values(loaded)
        self.kind = type(loaded).__name__

    def entries(self) -> dict[str, dict[str, TensorEntry]]:
        """The tensors of each state dict, by address."""
        return {
            address: {name: self._entry(address, name, value) for name, value in tensors.items()}
            for address, tensors in self._state_dicts().items()
        }

    def release(self) -> None:
        """Frees what was read."""
        self._found, self.extras = None, {}

    def _state_dicts(self) -> dict[str, dict[str, Any]]:
        if self._found is None:
            self._found = find_state_dicts(read_pickle(self._path))
        return self._found

    def _entry(self, address: str, name: str, value: Any) -> TensorEntry:
        if value.numel() * value.element_size() > _MOST_REPEATED * self._size:
            problem = (
                f"damaged file {self._path}: tensor {name!r} of shape {list(value.shape)} repeats its few elements"
            )
            raise CheckpointError("E0302", "checkpoint", problem, "save the model's state_dict() again")
        return TensorEntry(tuple(value.shape), value.dtype, lambda: self._tensor(address, name), value.layout)

    def _tensor(self, address: str, name: str) -> Tensor:
        value: Tensor = self._state_dicts()[address][name]
        self._read += value.nbytes
        if self._mapped and self._read > _MOST_MAPPED:
            self._found, self._read = None, 0
        return value


def open_weights(path: Path, wanted: str | None = None) -> Weights:
    """Finds and opens the weights at `path`: a file, an index of shards, or a folder.

    wanted: address of a state dict, its last part, or "ema" for the averaged copy. Raises CheckpointError.
    """
    found = find_weights(path)
    index = read_index(found.index) if found.index is not None else None
    files = found.files if found.index is None else files_of(found.index, (index or {}).values())
    if odd := next((file for file in files if not file.is_file()), None):
        problem = f"{odd} is not a regular file" if odd.exists() else f"no such file: {odd}"
        raise MissingCheckpointError("E0301", "checkpoint", problem, "give the file of weights, or its folder")
    pickles: list[_Pickle] = []
    extras: Mapping[str, Any] = {}
    if len(files) == 1 and index is None:
        candidates = _candidates(files[0], pickles)
        extras = pickles[0].extras if pickles else {}
    else:
        candidates = _joined(files, index, found.index or path, pickles)
    candidates = _with_part(candidates, wanted)
    address = choose(candidates, wanted, path)
    names, removed = strip_prefixes(candidates[address])
    notes = list(found.notes)
    others = [other for other in candidates if other != address]
    if others:
        notes.append(f"state dict {address} is read; --weights NAME takes another of {', '.join(others)}")
    if removed:
        notes.append(f"prefix {removed} removed from all names of tensors")
    return Weights(
        path=path,
        files=files,
        tensors=NamedTensors(names),
        extras=extras,
        sha256=sha256_of(files),
        address=address if others or wanted is not None else None,
        found=tuple(candidates),
        removed=removed,
        notes=tuple(notes),
        pickles=tuple(pickles),
    )


Candidates = Mapping[str, Mapping[str, TensorEntry]]


def _candidates(path: Path, pickles: list[_Pickle]) -> Candidates:
    """The state dicts of one file."""
    if _is_safetensors(path):
        tensors = read_safetensors(path).entries
        if not tensors:
            raise _no_tensors(path)
        return {prefix or "the file": group for prefix, group in split(tensors).items()}
    pickled = _Pickle(path)
    pickles.append(pickled)
    candidates = pickled.entries()
    if not candidates:
        got = f"a {pickled.kind}"
        if pickled.kind == "dict":
            got = f"keys {', '.join(list(pickled.extras)[:5])}" if pickled.extras else "no state dict"
        problem = f"no state dict in {path}: expected tensors by name, got {got}"
        raise CheckpointError(
            "E0303", "checkpoint", problem, "save the model's state_dict() alone, best as safetensors"
        )
    return candidates


def _no_tensors(path: Path) -> CheckpointError:
    return CheckpointError("E0303", "checkpoint", f"no tensors in {path}", "save the model's state_dict() there")


def _joined(files: tuple[Path, ...], index: Mapping[str, str] | None, path: Path, pickles: list[_Pickle]) -> Candidates:
    """The state dicts of several files together."""
    parts: dict[Path, Mapping[str, TensorEntry]] = {}
    for file in files:
        if _is_safetensors(file):
            parts[file] = read_safetensors(file).entries
            continue
        pickled = _Pickle(file)
        pickles.append(pickled)
        inside = pickled.entries()
        if len(inside) != 1:
            problem = f"no single state dict in shard {file}: expected one, got {len(inside)}"
            raise CheckpointError("E0303", "checkpoint", problem, "save the model's state_dict() again")
        parts[file] = next(iter(inside.values()))
    check_names(parts, index, path)
    tensors = {name: entry for entries in parts.values() for name, entry in entries.items()}
    if not tensors:
        raise _no_tensors(path)
    return {prefix or "the file": group for prefix, group in split(tensors).items()}


def _with_part(candidates: Candidates, wanted: str | None) -> Candidates:
    """With the part of a state dict whose names begin with `wanted`, where no address is that."""
    if wanted is None or any(address.rpartition("/")[2] == wanted.strip("./") for address in candidates):
        return candidates
    parts = {
        f"{address}/{wanted.strip('./')}".removeprefix("the file/"): {
            name: entry for name, entry in tensors.items() if name.startswith(f"{wanted.strip('./')}.")
        }
        for address, tensors in candidates.items()
    }
    return {**candidates, **{address: part for address, part in parts.items() if part}}


def _is_safetensors(path: Path) -> bool:
    """By the suffix, or by the first bytes: the length of a JSON header, and that header."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH + 1)
    size = path.stat().st_size
    return len(start) == _HEADER_LENGTH + 1 and start[-1:] == b"{" and int.from_bytes(start[:-1], "little") < size


def sha256_of(files: tuple[Path, ...]) -> str:
    """The SHA-256 of one file. Of several: that of the lines that `sha256sum` prints for their names, sorted."""
    digests = {file.name: _sha256(file) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
