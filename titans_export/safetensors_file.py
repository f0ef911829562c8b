"""Writing safetensors with the order and alignment that bundles need; reading is the safetensors package's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load

Array = NDArray[np.generic]


class Raw(NamedTuple):
    """A tensor of a type that NumPy may not have: the format's name of it, the shape, the bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        """As an array has it."""
        return len(self.data)


def write_safetensors(path: Path, tensors: Mapping[str, Array | Raw]) -> dict[str, int]:
    """Writes the tensors, largest first, and returns the offset of each in the file.

    The data starts on a multiple of 64 bytes and so does every tensor up to the first whose size is none.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].nbytes, name))
    header: dict[str, object] = {}
    begin = 0
    for name in order:
        value = tensors[name]
        end = begin + value.nbytes
        dtype = value.dtype if isinstance(value, Raw) else DTYPES[value.dtype.name].safetensors
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name]
            file.write(value.data if isinstance(value, Raw) else np.ascontiguousarray(value).tobytes())
    offsets = {}
    for name in order:
        offsets[name] = start
        start += tensors[name].nbytes
    return offsets
