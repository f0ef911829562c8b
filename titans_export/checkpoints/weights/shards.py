"""Several files that hold one model, with or without an index (`model.safetensors.index.json`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ... import strict_json
from ...errors import CheckpointError, MissingCheckpointError
from ...names import is_plain

_LARGEST = 256 << 20  # bytes of an index
_FIX = "copy all files of the checkpoint again"


def _wrong(problem: str, fix: str = _FIX) -> CheckpointError:
    return CheckpointError("E0317", "checkpoint", problem, fix)


def read_index(path: Path) -> dict[str, str]:
    """Name of each tensor to the name of its file, which lies beside the index. Raises CheckpointError."""
    try:
        if path.stat().st_size > _LARGEST:
            raise _wrong(f"{path} is larger than any index, {_LARGEST} bytes")
        with path.open("rb") as file:
            index = strict_json.loads(file.read(_LARGEST), plain=False)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _wrong(f"{path} is not a readable index: {error}") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise _wrong(f"{path} is not an index: it has no weight_map")
    for tensor, file in names.items():
        if not isinstance(file, str) or not is_plain(file):
            problem = f"{path} assigns {tensor!r} to {file!r}, expected the name of a file beside it"
            raise _wrong(problem, "do not trust this checkpoint, or correct the index")
    return names


def files_of(path: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The files of an index, checked: present, regular, and inside of the folder. Raises CheckpointError."""
    folder = path.parent.resolve()
    files = []
    for name in sorted(set(names)):
        file = path.parent / name
        if not file.is_file():
            what = "is not a regular file" if file.exists() else "is missing"
            raise MissingCheckpointError("E0317", "checkpoint", f"shard {name} of {path} {what}", _FIX)
        if file.is_symlink() and not _may_follow(folder, file.resolve()):
            problem = f"shard {name} of {path} is a link to {file.resolve()}, outside of its folder"
            raise _wrong(problem, "put the file itself there, if you trust the checkpoint")
        files.append(file)
    return tuple(files)


def _may_follow(folder: Path, target: Path) -> bool:
    """Links inside of the folder, and those of the Hugging Face cache: snapshots/REVISION/NAME to blobs/HASH."""
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    return target.is_relative_to(folder) or (cache is not None and target.parent == cache.resolve())


def check_names(per_file: Mapping[Path, Iterable[str]], index: Mapping[str, str] | None, path: Path) -> None:
    """Compares the tensors of each file with the index, and the files with each other. Raises CheckpointError."""
    owner: dict[str, Path] = {}
    for file, names in per_file.items():
        for name in names:
            if name in owner:
                raise _wrong(f"tensor {name!r} is in two shards, {owner[name].name} and {file.name}")
            owner[name] = file
            if index is not None and index.get(name) != file.name:
                listed = f"which the index has in {index[name]}" if name in index else "which the index does not list"
                raise _wrong(f"shard {file.name} has a tensor {name!r}, {listed}")
    if missing := next((name for name in index or {} if name not in owner), None):
        raise _wrong(f"shard {(index or {})[missing]} lacks a tensor {missing!r} that {path.name} lists")
