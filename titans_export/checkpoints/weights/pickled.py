"""Files of torch.save, read without running code: tensors, plain values, and `harmless` classes."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import CheckpointError
from ...files import utf8_path
from .harmless import harmless_names, plain, stand_ins
from .naming import WRAPPERS

_MOST_OPCODES = 4_000_000  # of a pickle, when its contents are listed for an error
_SHOWN = 3  # classes in an error
_ALWAYS_ALLOWED = re.compile(
    r"torch\b.*Storage$|torch\._utils\.|collections\.|torch\.(Size|device|\w*int\w*|b?float\d*)$"
)


def read_pickle(path: Path) -> Any:
    """The contents of the file. A zip file is mapped, the older format is read whole. Raises CheckpointError."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with utf8_path(path) as name:
                return plain(torch.load(name, map_location="cpu", weights_only=True, mmap=zipped))
    except pickle.UnpicklingError:
        raise _refusal(path) from None
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if "TorchScript" in str(error):
            problem = f"{path} is a TorchScript archive, which holds code"
            raise CheckpointError(
                "E0303", "checkpoint", problem, _clean(path, "torch.jit.load({path})", ".state_dict()")
            ) from None
        text = (str(error).splitlines() or ["too few bytes"])[0]
        problem = f"damaged file {path}: {text.split('. ')[0].rstrip('.')}"
        raise CheckpointError("E0302", "checkpoint", problem, "copy it or save the state_dict() again") from None
    except Exception:  # the unpickler raises any kind for damaged bytes
        raise _refusal(path) from None


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError("E0302", "checkpoint", f"truncated file {path}", "copy or save it again")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        problem = f"damaged file {path}: {error}"
        raise CheckpointError("E0302", "checkpoint", problem, "copy or save it again") from None
    if packed is not None:  # torch.save never compresses, and a small file could become a huge tensor
        problem = f"{path} is compressed, which torch.save never does"
        raise CheckpointError("E0302", "checkpoint", problem, "load it in Python and save it again with torch.save")


def _refusal(path: Path) -> CheckpointError:
    classes, words = _contents(path)
    if classes:
        shown = ", ".join(classes[:_SHOWN]) + (f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else "")
        problem = f"{path} has more than tensors: it is a pickle that would run code, {shown} (no code was run)"
    else:
        problem = f"{path} has more than tensors: it is damaged or not a file of torch.save (no code was run)"
        return CheckpointError(
            "E0303", "checkpoint", problem, "save the model's state_dict() alone, best as safetensors"
        )
    key = next((f"[{word!r}]" for word in WRAPPERS if word in words), "")
    module = ".state_dict()" if "_parameters" in words and "_modules" in words else ""
    load = 'torch.load({path}, map_location="cpu", weights_only=False)'
    return CheckpointError("E0303", "checkpoint", problem, _clean(path, load, key + module))


def _clean(path: Path, load: str, tensors: str) -> str:
    """Two lines of Python that write the tensors alone."""
    call = load.format(path=repr(str(path)))
    return (
        "if you trust it, make a clean file with these two lines of Python, or save as safetensors: "
        f'`import torch; loaded = {call}` and `torch.save(loaded{tensors}, "clean.pt")`'
    )


def _contents(path: Path) -> tuple[list[str], set[str]]:
    """The classes and functions that the pickle names and that are not harmless, and all its short texts."""
    harmless = harmless_names()
    found: dict[str, None] = {}
    words: set[str] = set()
    try:
        for name, texts in _names(path):
            words |= texts
            if name and name not in harmless and not _ALWAYS_ALLOWED.match(name):
                found[name] = None
    except Exception:  # damaged: what was found so far is enough for a message
        pass
    return list(found), words


def _names(path: Path) -> Iterator[tuple[str, set[str]]]:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            for _ in range(5):  # the older format is several pickles in a row
                yield from _opcodes(file)
            return
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as inner:
            yield from _opcodes(inner)  # type: ignore[arg-type]


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, set[str]]]:
    strings: list[str] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > _MOST_OPCODES:
            return
        if opcode.name == "GLOBAL":
            yield ".".join(str(argument).split(" ", 1)), set()
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            yield ".".join(strings[-2:]), set()
        elif isinstance(argument, str):
            strings.append(argument)
            del strings[:-2]
            yield "", {argument}
