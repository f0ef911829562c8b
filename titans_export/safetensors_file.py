"""Writing safetensors with the order and alignment that bundles need, and mapping them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, Dtype
from .progress import Advance

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load
_BLOCK = 1 << 24  # bytes per write
_NAMED = {dtype.safetensors: dtype for dtype in DTYPES.values()}

Array = NDArray[np.generic]


class Raw(NamedTuple):
    """A tensor of a type that NumPy may lack: the format's name of the type, the shape, the bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """As an array has it."""
        return len(self.data)


def write_safetensors(
    path: Path, tensors: Mapping[str, Array | Raw], advance: Advance = lambda size: None
) -> dict[str, int]:
    """Writes the tensors and returns the offset of each in the file. Mapped arrays are streamed, not copied.

    Every tensor is aligned to its elements, and to ALIGNMENT bytes if its size is a multiple of that. The format
    permits no gaps, so such tensors come first, the largest first. The others follow by falling element size. advance:
    takes the bytes of each write.
    """
    order = sorted(tensors, key=lambda name: (*_place(tensors[name]), name))
    header: dict[str, object] = {}
    begin = 0
    for name in order:
        value = tensors[name]
        end = begin + value.nbytes
        header[name] = {"dtype": _dtype(value).safetensors, "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    offsets = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            offsets[name] = file.tell()
            for block in blocks_of(tensors[name]):
                file.write(block)
                advance(len(block))
    return offsets


def map_float32(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a file that `write_safetensors` wrote, mapped. Writes to them do not reach the file."""
    data = np.memmap(path, np.uint8, "c").view(np.ndarray)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    mapped = {}
    for name, entry in header.items():
        if entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            mapped[name] = data[start + begin : start + end].view(np.float32).reshape(entry["shape"])
    return mapped


def _dtype(value: Array | Raw) -> Dtype:
    return _NAMED[value.dtype] if isinstance(value, Raw) else DTYPES[value.dtype.name]


def _place(value: Array | Raw) -> tuple[int, int]:
    """The sort key of a tensor. Each group's sizes are multiples of the next group's alignment."""
    aligned = value.nbytes % ALIGNMENT == 0
    return -(ALIGNMENT if aligned else _dtype(value).bytes), -value.nbytes


def blocks_of(value: Array | Raw) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order."""
    data = value.data if isinstance(value, Raw) else np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    content = memoryview(data)  # type: ignore[arg-type]
    for start in range(0, len(content), _BLOCK):
        yield content[start : start + _BLOCK]
