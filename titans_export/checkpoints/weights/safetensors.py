"""Tensors of a safetensors file, each mapped by itself, so that memory is free once a tensor is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import strict_json
from ...errors import CheckpointError
from ...files import utf8_path
from ...named_tensors import NamedTensors, TensorEntry

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_METADATA = "__metadata__"


def read_safetensors(path: Path) -> NamedTensors:
    """The tensors of the file. Raises CheckpointError."""
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt"):  # checks sizes and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = strict_json.loads(file.read(length), plain=False)
    except (SafetensorError, OSError, ValueError) as error:
        problem = f"damaged file {path}: {error}"
        raise CheckpointError("E0302", "checkpoint", problem, "copy or save it again") from None
    aliases = header.pop(_METADATA, None) or {}
    entries = {name: _entry(path, 8 + length, name, described) for name, described in header.items()}
    # save_model writes tensors that share memory once, and lists their other names in the metadata.
    others = {name: entries[kept] for name, kept in aliases.items() if kept in entries and name not in entries}
    return NamedTensors(entries | others)


def _entry(path: Path, start: int, name: str, described: dict[str, Any]) -> TensorEntry:
    dtype = _DTYPES.get(described["dtype"])
    if dtype is None:
        problem = f"wrong dtype of tensor {name}: expected float32, float64, float16 or bfloat16"
        fix = "give the checkpoint from before it was quantised or packed"
        raise CheckpointError("E0306", "checkpoint", f"{problem}, got {described['dtype']}", fix)
    shape, (begin, end) = tuple(described["shape"]), described["data_offsets"]

    def read() -> Tensor:
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        try:
            # Copy on write: PyTorch has no read-only tensors.
            raw: np.ndarray[Any, Any] = np.memmap(path, np.uint8, "c", start + begin, (end - begin,))
        except (OSError, ValueError) as error:  # the file was replaced or cut meanwhile
            problem = f"damaged file {path}: {error}"
            raise CheckpointError("E0302", "checkpoint", problem, "copy or save it again") from None
        if (start + begin) % dtype.itemsize:
            raw = np.array(raw)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    return TensorEntry(shape, dtype, read)
