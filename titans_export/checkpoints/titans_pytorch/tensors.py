"""Reading a state dict from a file: only tensors, unwrapped, checked and in float32."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError, MissingCheckpointError
from .layout import Shapes

Tensors = dict[str, torch.Tensor]
WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys of the state dict in training scripts
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, and a module around it
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1 << 22
_SAVE_ALONE = "save the model's state_dict() alone, best as safetensors"


def read_tensors(path: Path) -> tuple[Tensors, str]:
    """The state dict in the file, as saved, and the file's SHA-256."""
    if not path.is_file():
        problem = f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}"
        raise MissingCheckpointError("E0301", "checkpoint", problem, "give the state dict's .pt or .safetensors file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_read_pickle(path), path)
    if not tensors:
        raise CheckpointError("E0303", "checkpoint", f"no tensors in {path}", "save the model's state_dict() there")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return _strip_prefixes(tensors), digest.hexdigest()


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError("E0302", "checkpoint", f"damaged file {path}: {error}", "copy or save it again") from None
    # safetensors' save_model writes tensors that share memory once and notes the other names in the metadata.
    return tensors | {name: tensors[kept] for name, kept in aliases.items() if kept in tensors and name not in tensors}


def _read_pickle(path: Path) -> Any:
    """The file's contents, read without running code."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError("E0302", "checkpoint", f"truncated file {path}", "copy or save it again")
    try:
        # Only the zip format can be mapped; the older one is read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        detail = f"it is a pickle that would run code, {code[1]}" if code else "it is damaged or another kind of pickle"
    except (RuntimeError, OSError, EOFError, struct.error) as error:
        text = (str(error).splitlines() or ["too few bytes"])[0]
        problem = f"damaged file {path}: {text.split('. ')[0].rstrip('.')}"
        raise CheckpointError("E0302", "checkpoint", problem, "copy it or save the state_dict() again") from None
    except Exception:  # the unpickler raises any kind for damaged bytes
        detail = "it is not a file of torch.save"
    problem = f"{path} has more than tensors: {detail} (no code was run)"
    raise CheckpointError("E0303", "checkpoint", problem, _SAVE_ALONE) from None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def _unwrap(loaded: Any, path: Path) -> Tensors:
    value = loaded
    while isinstance(value, Mapping) and not _is_state_dict(value):
        inside = next((value[key] for key in WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if inside is None:
            break
        value = inside
    if not _is_state_dict(value):
        got = f"a {type(loaded).__name__}"
        if isinstance(value, Mapping):
            odd = [str(key) for key, item in value.items() if not isinstance(item, torch.Tensor)]
            got = f"also {', '.join(odd[:3])}" if odd else "an empty dict"
        wrappers = ", ".join(WRAPPERS)
        problem = f"no state dict in {path}: expected one, or one under {wrappers}, got {got}"
        raise CheckpointError("E0303", "checkpoint", problem, _SAVE_ALONE)
    return {str(name): tensor for name, tensor in value.items()}


def _strip_prefixes(tensors: Tensors) -> Tensors:
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def shapes_of(tensors: Tensors) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_layout(shapes: Shapes, expected: Shapes, what: str) -> None:
    """Raises CheckpointError unless the tensors are exactly those of the options, with their shapes."""
    if missing := [name for name in expected if name not in shapes]:
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"missing tensors of a {what} with these options: {', '.join(missing[:3])}",
            "give the state dict of the whole, unchanged module",
        )
    if unknown := sorted(set(shapes) - set(expected)):
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"unknown tensors for a {what} with these options: {', '.join(unknown[:3])}",
            "give an unchanged model of titans-pytorch 0.5",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                "E0304",
                "checkpoint",
                f"wrong shape of tensor {name}: expected {list(shape)}, got {list(shapes[name])}",
                "give an unchanged state dict of titans-pytorch 0.5",
            )


def _is_unused_copy(name: str) -> bool:
    return ".memory_model." in f".{name}"


def checked(tensors: Tensors, expected: Shapes) -> Tensors:
    """The tensors in float32, checked, in the order of `expected`, without the unused copies in memory_model."""
    kept = {}
    for name in expected:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            dtype = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise CheckpointError(
                "E0306",
                "checkpoint",
                f"wrong dtype of tensor {name}: expected float32, float64, float16 or bfloat16, got {dtype}",
                "give the checkpoint from before it was quantised or packed",
            )
        if _is_unused_copy(name):
            continue
        value = tensor.detach().to("cpu", torch.float32).contiguous()
        if not torch.isfinite(value).all():
            raise CheckpointError(
                "E0307", "checkpoint", f"NaN or infinity in tensor {name}", "give an earlier checkpoint"
            )
        kept[name] = value
    _check_rotary(kept)
    return kept


def _check_rotary(tensors: Tensors) -> None:
    """The rotary frequencies are saved but never trained; half precision rounds them."""
    for name, value in tensors.items():
        if name.endswith("rotary_emb.freqs"):
            exponents = torch.arange(len(value)) / len(value)
            if not torch.allclose(value, 10_000.0**-exponents, rtol=1e-2, atol=1e-6):
                raise CheckpointError(
                    "E0304",
                    "checkpoint",
                    f"tensor {name} differs from the library's rotary frequencies",
                    "give an unchanged model of titans-pytorch 0.5",
                )
