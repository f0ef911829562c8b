"""Graphs without their weights: large initialisers refer to files by absolute path, and are mapped when they are read.

So a graph of any size is small in memory, and protobuf's limit of 2 GiB does not apply.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import xxhash
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from ..safetensors_file import ALIGNMENT, Array, Raw, blocks_of
from .files import load_structure
from .initializers import replace_initializers, tensor_bytes
from .nodes import copy_model

SMALL_BYTES = 1024  # smaller initialisers stay in their graph
# Safetensors lacks 4-bit types, so two int4 values are stored as one byte.
_RAW: dict[int, str] = {TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "F8_E4M3", TensorProto.INT4: "U8"}


def mapped(structure: ModelProto, folder: Path) -> ModelProto:
    """A copy whose references to files in `folder` have absolute paths."""
    model = copy_model(structure)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            point_to(tensor, _stored((folder / info.location).resolve()), info.offset or 0, _size(tensor))
    return model


def load_mapped(path: Path) -> ModelProto:
    """Loads the graph; its references to files beside `path` become absolute."""
    return mapped(load_structure(path), path.parent)


def is_mapped(tensor: TensorProto) -> bool:
    """Whether the initialiser refers to a file by absolute path."""
    return bool(uses_external_data(tensor)) and Path(ExternalDataInfo(tensor).location).is_absolute()


def value_of(tensor: TensorProto) -> Array | Raw:
    """The initialiser's value in the form stored in a safetensors file: mapped from its file, or from the graph."""
    if tensor.data_type not in _RAW:
        return array_of(tensor)
    data = _map(tensor, _size(tensor)) if uses_external_data(tensor) else tensor.raw_data
    shape = (len(data),) if tensor.data_type == TensorProto.INT4 else tuple(tensor.dims)
    return Raw(_RAW[tensor.data_type], shape, data)


def array_of(tensor: TensorProto) -> NDArray[Any]:
    """The initialiser as a read-only array, in ml_dtypes' types where NumPy has none. int4 must be in the graph."""
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    assert tensor.data_type != TensorProto.INT4
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return _map(tensor, _size(tensor)).view(dtype).reshape(tuple(tensor.dims))


def same_reference(a: TensorProto, b: TensorProto) -> bool:
    """Whether both refer to the same bytes of the same file."""
    return is_mapped(a) and is_mapped(b) and list(a.external_data) == list(b.external_data)


def point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Makes the initialiser a reference into a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


class Spill:
    """A file for new initialisers, which vanishes with the process. Equal ones are stored once."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._offsets: dict[tuple[int, bytes], int] = {}

    def move(self, tensor: TensorProto) -> TensorProto:
        """The initialiser as a reference into the file; small ones and references as they are."""
        if uses_external_data(tensor) or _size(tensor) < SMALL_BYTES:
            return tensor
        if not tensor.HasField("raw_data"):
            tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
        key = tensor.data_type, xxhash.xxh3_128_digest(tensor.raw_data)
        if key not in self._offsets:
            self._offsets[key] = self._file.seek(-(-self._file.seek(0, 2) // ALIGNMENT) * ALIGNMENT)
            self._file.write(tensor.raw_data)
            self._file.flush()
        moved = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        point_to(moved, f"/dev/fd/{self._file.fileno()}", self._offsets[key], _size(tensor))
        return moved

    def close(self) -> None:
        """Removes the file. References into it end."""
        self._file.close()


@contextmanager
def spilling(folder: Path | None) -> Iterator[Spill]:
    """A spill file on the file system of `folder`."""
    spill = Spill(folder)
    try:
        yield spill
    finally:
        spill.close()


def write_graph(model: ModelProto, path: Path) -> Path:
    """Writes the graph to `path` and its large weights beside it, because protobuf files are limited to 2 GiB."""
    data = path.with_suffix(".data")
    result = copy_model(model)
    with data.open("wb") as file:
        for tensor in result.graph.initializer:
            if not is_mapped(tensor) and _size(tensor) < SMALL_BYTES:
                continue
            offset = file.seek(-file.tell() % ALIGNMENT, 1)
            for block in blocks_of(value_of(tensor)):
                file.write(block)
            point_to(tensor, data.name, offset, file.tell() - offset)
        empty = file.tell() == 0
    if empty:
        data.unlink()
    path.write_bytes(result.SerializeToString())
    return path


def check_structure(model: ModelProto) -> None:
    """Runs ONNX's checker on the graph. References count as inputs, so their files are not opened."""
    graph = model.graph
    bare = copy_model(model)
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    replace_initializers(bare.graph, [tensor for tensor in graph.initializer if not uses_external_data(tensor)])
    onnx.checker.check_model(bare)


def for_session(model: ModelProto, folder: Path) -> ModelProto:
    """A copy for ONNX Runtime: references into `folder` become relative to it, and other mapped values are inside."""
    result = copy_model(model)
    for tensor in result.graph.initializer:
        if not is_mapped(tensor):
            continue
        info = ExternalDataInfo(tensor)
        location = _path(info.location)
        if location.parent == folder.resolve():
            point_to(tensor, location.name, info.offset or 0, _size(tensor))
        else:
            data = _map(tensor, _size(tensor)).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = data
    return result


def _stored(path: Path) -> str:
    """An absolute path as text. The bytes of a name may be no UTF-8, so each is stored as one character."""
    return os.fsencode(path).decode("latin-1")


def _path(location: str) -> Path:
    return Path(os.fsdecode(location.encode("latin-1")))


def _size(tensor: TensorProto) -> int:
    """Bytes of the value."""
    length = ExternalDataInfo(tensor).length if uses_external_data(tensor) else None
    return tensor_bytes(tensor.dims, tensor.data_type) if length is None else int(length)


def _map(tensor: TensorProto, size: int) -> NDArray[np.uint8]:
    info = ExternalDataInfo(tensor)
    if not size:
        return np.zeros(0, np.uint8)
    return np.memmap(_path(info.location), np.uint8, "r", info.offset or 0, (size,)).view(np.ndarray)
