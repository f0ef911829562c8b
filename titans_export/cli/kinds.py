"""What a path on the command line holds, so that a wrong kind of file is answered with the right command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, TypeAlias

from ..errors import BundleError, CheckpointError, MissingBundleError, StateError
from ..manifest import MANIFEST

Kind: TypeAlias = Literal["bundle", "state", "checkpoint", "text", "folder", "nothing"]
_NAMES = {
    "bundle": "a bundle",
    "state": "a state file",
    "checkpoint": "a checkpoint",
    "text": "a file of another kind",
    "folder": "a folder without a manifest.json",
    "nothing": "missing",
}
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_ENCRYPTED = b"TITANSE1"
_STATE = re.compile(rb'"format"\s*:\s*"titans-state"')
_HEADER = 1 << 20  # bytes of a safetensors header that are read
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def kind_of(path: Path) -> Kind:
    """The kind of file or folder, from names and first bytes."""
    if path.is_dir():
        if (path / MANIFEST).exists():
            return "bundle"
        names = [entry.name for entry in path.iterdir()]
        return "checkpoint" if any(name.endswith(_WEIGHTS) for name in names) else "folder"
    if not path.is_file():
        return "nothing"
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, _HEADER)) if len(start) == 8 else b""
    if start == _ENCRYPTED or _STATE.search(header):
        return "state"
    if header[:1] == b"{" or start.startswith(_PICKLES):
        return "checkpoint"
    return "text"


def check_bundle(path: Path) -> None:
    """Raises BundleError if the path holds no bundle. The reader checks the rest."""
    kind = _look(path)
    if kind in ("bundle", None):
        return
    if kind == "nothing":
        raise MissingBundleError("E0201", "bundle", f"{path} does not exist", "give the path of a NAME.titans folder")
    fix = {
        "state": f"continue the stream with: titans-export run BUNDLE --state {path}",
        "checkpoint": f"make a bundle of it: titans-export export {path} -o NAME.titans",
        "text": f"give the path of a NAME.titans folder; read the file with: titans-export run BUNDLE --text {path}",
    }.get(str(kind), "give the path of a NAME.titans folder")
    raise BundleError("E0201", "bundle", f"expected a bundle, and {path} is {_NAMES[str(kind)]}", fix)


def check_checkpoint(path: Path) -> None:
    """Raises CheckpointError if the path holds a bundle or a state file. The reader checks the rest."""
    fix = {
        "bundle": f"run it: titans-export run {path}",
        "state": f"continue the stream with: titans-export run BUNDLE --state {path}",
    }.get(str(kind := _look(path)))
    if fix is not None:
        raise CheckpointError("E0301", "checkpoint", f"expected a checkpoint, and {path} is {_NAMES[str(kind)]}", fix)


def check_state(path: Path, wanted: str = "a state file") -> None:
    """Raises StateError if the path holds something other than a state file. The reader checks the rest."""
    kind = _look(path)
    if kind in ("state", "nothing", None) or path.suffix == ".tstate":
        return
    fix = {
        "bundle": f"look at it with: titans-export inspect {path}",
        "checkpoint": f"make a bundle of it: titans-export export {path} -o NAME.titans",
    }.get(str(kind), "give a file that titans-export run --state or Stream.save wrote")
    raise StateError("E0401", "state", f"expected {wanted}, and {path} is {_NAMES[str(kind)]}", fix)


def _look(path: Path) -> Kind | None:
    """As `kind_of`; None if the path cannot be read, which its reader reports."""
    try:
        return kind_of(path)
    except (OSError, ValueError):
        return None
