"""Writing safetensors with the order and alignment that bundles need; reading is the safetensors package's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load

Array = NDArray[np.generic]
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "bool": "BOOL"}


def write_safetensors(path: Path, tensors: dict[str, Array]) -> dict[str, int]:
    """Writes the tensors, largest first, and returns the offset of each in the file.

    The data starts on a multiple of 64 bytes and so does every tensor up to the first whose size is none.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].nbytes, name))
    header: dict[str, object] = {}
    begin = 0
    for name in order:
        value = tensors[name]
        end = begin + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())
    offsets = {}
    for name in order:
        offsets[name] = start
        start += tensors[name].nbytes
    return offsets
