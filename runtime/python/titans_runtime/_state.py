"""Reads state files without a session. docs/state.md defines the format."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._library import BytePointer, StateOptions, check, invalid, lib

Key: TypeAlias = "bytes | bytearray | memoryview"

# The dtypes of safetensors. NumPy lacks bfloat16 and float8, so these are read as bits.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "I16": "<i2",
    "U16": "<u2",
    "I8": "i1",
    "U8": "u1",
    "F8_E4M3": "u1",
    "BOOL": "?",
}
_BLOCK = 32  # elements along a row that share a scale


@dataclass(frozen=True)
class State:
    """A state file: ``metadata`` from its header and ``tensors`` as stored, including "last_output"."""

    metadata: dict[str, str]
    position: int
    tensors: dict[str, npt.NDArray[Any]]

    @property
    def learning(self) -> bool:
        """Whether the stream learned when it was saved."""
        return self.metadata["learning"] == "true"

    @property
    def state(self) -> list[dict[str, Any]]:
        """Name, role, dtype, shape and layout of each state tensor, as in a bundle's manifest."""
        entries: list[dict[str, Any]] = json.loads(self.metadata["state"])
        return entries

    def memory(self) -> dict[str, npt.NDArray[np.float32]]:
        """The memory fields, such as "layers.0.memory.W0", as float32 arrays of shape (1, heads, rows, columns)."""
        fields: dict[str, npt.NDArray[np.float32]] = {}
        for entry in self.state:
            if entry["role"] != "memory":
                continue
            rows = np.asarray(self.tensors[entry["name"]], np.float32)
            if not entry.get("layout"):
                fields[entry["name"]] = rows
            for field in entry.get("layout", []):
                fields[f"{entry['name']}.{field['name']}"] = _unpack(rows, field)
        return fields


def read_state(path: str | os.PathLike[str], key: Key | None = None) -> State:
    """Reads and verifies a state file. ``key``, 32 bytes, decrypts it. Raises Error for a damaged or altered file."""
    options, name = state_options(key), encode_path(path)
    size = ctypes.c_size_t()
    check(lib.titans_state_read(name, ctypes.byref(options), None, 0, ctypes.byref(size)))
    content = bytearray(size.value)
    buffer = (ctypes.c_uint8 * size.value).from_buffer(content)
    pointer = ctypes.cast(buffer, BytePointer)
    check(lib.titans_state_read(name, ctypes.byref(options), pointer, size.value, ctypes.byref(size)))
    # The file may have been replaced by a smaller one between the two calls.
    return _parse(memoryview(content)[: size.value])


def state_options(key: Key | None) -> StateOptions:
    """Options of the C interface. They keep the key alive."""
    options = StateOptions(struct_size=ctypes.sizeof(StateOptions))
    if key is None:
        return options
    if not isinstance(key, (bytes, bytearray, memoryview)):
        raise invalid("E0406", "state", f"expected a key as bytes, got {type(key).__name__}", "pass 32 bytes")
    copy = bytes(key)
    if not copy:
        raise invalid("E0406", "state", "expected a key of 32 bytes, got 0", "pass None for no encryption")
    options.kept = (ctypes.c_uint8 * len(copy)).from_buffer_copy(copy)
    options.key = ctypes.cast(options.kept, BytePointer)
    options.key_bytes = len(copy)
    return options


def encode_path(path: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise invalid("E0501", "state", f"path with NUL: {path!r}", "pass a path without NUL")
    return encoded


def _parse(content: memoryview) -> State:
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
    metadata: dict[str, str] = header.pop("__metadata__")
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(content[begin:end], np.dtype(_DTYPES[entry["dtype"]]))
        tensors[name] = raw.reshape(entry["shape"]).copy()
    return State(metadata, int(metadata["position"]), tensors)


def _unpack(rows: npt.NDArray[np.float32], field: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Rows (..., R) to the values of a field, (..., *shape)."""
    shape: Sequence[int] = field["shape"]
    dtype = field.get("dtype", "float32")
    count, columns = int(np.prod(shape, dtype=np.int64)), shape[-1] if shape else 1
    lead = rows.shape[:-1]
    words = np.ascontiguousarray(rows[..., field["offset"] :])
    if dtype == "float32":
        values = words[..., :count]
    elif dtype == "bfloat16":
        values = _from_bfloat16(words.view(np.uint16)[..., :count])
    elif dtype == "float16":
        values = words.view(np.float16)[..., :count].astype(np.float32)
    else:
        codes = words.view(np.uint8)[..., :count]
        blocks = -(-columns // _BLOCK)
        lines = count // columns if columns else 0
        scales = words[..., -(-count // 4) :].view(np.uint16)[..., : lines * blocks]
        each = np.repeat(_from_bfloat16(scales).reshape(*lead, lines, blocks), _BLOCK, -1)[..., :columns]
        elements = codes.view(np.int8).astype(np.float32) if dtype == "int8" else _from_e4m3(codes)
        values = elements.reshape(*lead, lines, columns) * each
    return np.ascontiguousarray(values.reshape(*lead, *shape), np.float32)


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.ascontiguousarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _from_e4m3(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    exponent, mantissa = (codes >> 3).astype(np.int32) & 15, codes & 7
    steps = np.where(exponent == 0, mantissa, mantissa + 8).astype(np.float32)
    values = np.ldexp(steps, np.maximum(exponent, 1) - 10)
    signed: npt.NDArray[np.float32] = np.where(codes & 0x80, -values, values).astype(np.float32)
    return signed
