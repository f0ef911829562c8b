"""Low-precision memories (docs/memory-common.md): packing with rounding to nearest, and unpacking.

Uses NumPy, on rows from a state file or a runtime. Stochastic rounding and error feedback exist in the kernels only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import BLOCK, MEMORY_DTYPES, SCALED, PackedField, field_words, matrix
from ..errors import TitansError
from ..manifest import LayoutField
from ..row_fields import STORED_KINDS, RowField, rounding_error_of

ROUNDINGS = ("nearest", "stochastic", "error_feedback")
ROW_ALIGNMENT = 16  # words: a head's row starts on a 64-byte line

_LARGEST = {memory_dtype: np.float32(MEMORY_DTYPES[memory_dtype]) for memory_dtype in SCALED}
_SMALLEST_BLOCK = np.float32(2.0**-100)
_NAN_SCALE = 0x7FC0

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]


def _check(memory_dtype: str) -> None:
    if memory_dtype not in MEMORY_DTYPES:
        raise _invalid("memory_dtype", MEMORY_DTYPES, memory_dtype)


def _invalid(name: str, allowed: Iterable[str], got: str) -> TitansError:
    problem = f"invalid attribute {name}: expected one of {', '.join(allowed)}, got {got}"
    return TitansError("E0701", "memory_dtype", problem, "choose one of them")


def _to_words(elements: NDArray[Any]) -> Words:
    """(..., n) elements of 8 or 16 bits to (..., words), zero-padded."""
    per_word = 4 // elements.dtype.itemsize
    missing = -elements.shape[-1] % per_word
    filled = np.concatenate([elements, np.zeros((*elements.shape[:-1], missing), elements.dtype)], -1)
    return np.ascontiguousarray(filled).view(np.uint32)


def _from_words(packed: Words, dtype: Any, count: int) -> NDArray[Any]:
    elements: NDArray[Any] = np.ascontiguousarray(packed).view(dtype)[..., :count]
    return elements


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    kept: NDArray[np.uint16] = np.where(np.isnan(values), np.uint32(_NAN_SCALE), rounded).astype(np.uint16)
    return kept


def _from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    values: Floats = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _e4m3(magnitude: Floats) -> NDArray[np.uint8]:
    """E4M3 codes of finite magnitudes, without sign."""
    _, exponent = np.frexp(magnitude)  # of [0.5, 1)
    exponent = np.clip(np.where(magnitude > 0, exponent - 1, -6), -6, 8)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int32)
    codes: NDArray[np.uint8] = np.minimum((exponent + 6) * 8 + steps, 0x7E).astype(np.uint8)
    return codes


def _from_e4m3(codes: NDArray[np.uint8]) -> Floats:
    exponent, mantissa = (codes >> 3).astype(np.int32) & 15, codes & 7
    steps = np.where(exponent == 0, mantissa, mantissa + 8).astype(np.float32)
    values = np.ldexp(steps, np.maximum(exponent, 1) - 10)
    signed: Floats = np.where(codes & 0x80, -values, values).astype(np.float32)
    return signed


def _blocks(values: NDArray[Any]) -> NDArray[Any]:
    """(..., r, c) to (..., r, blocks, BLOCK), zero-padded."""
    missing = -values.shape[-1] % BLOCK
    filled = np.concatenate([values, np.zeros((*values.shape[:-1], missing), values.dtype)], -1)
    return filled.reshape(*values.shape[:-1], -1, BLOCK)


def _scales(blocks: Floats, largest: np.float32) -> NDArray[np.uint16]:
    """One bfloat16 scale per block, rounded up so that no value clips."""
    top = np.abs(blocks).max(-1)
    finite = np.isfinite(blocks).all(-1)
    exact = (np.where(finite, top, 0) / largest).astype(np.float32)
    up = (np.ascontiguousarray(exact).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
    up = np.where(top < _SMALLEST_BLOCK, np.uint32(0), up)
    scales: NDArray[np.uint16] = np.where(finite, up, np.uint32(_NAN_SCALE)).astype(np.uint16)
    return scales


def pack(values: Floats, memory_dtype: str) -> Words:
    """(..., rows, columns) to the words of a field, (..., n). Each value is rounded to nearest."""
    _check(memory_dtype)
    values = np.ascontiguousarray(values, np.float32)
    lead, (rows, columns) = values.shape[:-2], values.shape[-2:]
    flat = values.reshape(*lead, -1)
    if memory_dtype == "float32":
        same: Words = flat.view(np.uint32).copy()
        return same
    if memory_dtype == "bfloat16":
        return _to_words(_bfloat16(flat))
    if memory_dtype == "float16":
        with np.errstate(over="ignore"):
            return _to_words(flat.astype(np.float16))
    blocks = _blocks(values)
    scales = _scales(blocks, _LARGEST[memory_dtype])
    factors = _from_bfloat16(scales)
    usable = np.isfinite(factors) & (factors > 0)
    reciprocals = np.float32(1) / np.where(usable, factors, np.float32(1))
    scaled = np.where(usable[..., None], blocks, np.float32(0)) * reciprocals[..., None]
    magnitudes = np.minimum(np.abs(scaled), _LARGEST[memory_dtype])
    if memory_dtype == "int8":
        codes = np.copysign(np.rint(magnitudes), scaled).astype(np.int8).view(np.uint8)
    else:
        codes = _e4m3(magnitudes) | np.where(np.signbit(scaled), np.uint8(0x80), np.uint8(0))
    codes = codes.reshape(*lead, rows, -1)[..., :columns].reshape(*lead, -1)
    return np.concatenate([_to_words(codes), _to_words(scales.reshape(*lead, -1))], -1)


def unpack(packed: Words, shape: Sequence[int], memory_dtype: str) -> Floats:
    """The words of a field, (..., n), to values (..., *shape)."""
    _check(memory_dtype)
    rows, columns = matrix(shape)
    lead, count = packed.shape[:-1], rows * columns
    if memory_dtype == "float32":
        values: NDArray[Any] = _from_words(packed, np.float32, count)
    elif memory_dtype == "bfloat16":
        values = _from_bfloat16(_from_words(packed, np.uint16, count))
    elif memory_dtype == "float16":
        values = _from_words(packed, np.float16, count)
    else:
        split, blocks = -(-count // 4), -(-columns // BLOCK)
        codes = _from_words(packed[..., :split], np.uint8, count)
        scales = _from_bfloat16(_from_words(packed[..., split:], np.uint16, rows * blocks))
        elements = codes.view(np.int8).astype(np.float32) if memory_dtype == "int8" else _from_e4m3(codes)
        each = np.repeat(scales.reshape(*lead, rows, blocks), BLOCK, -1)[..., :columns]
        values = elements.reshape(*lead, rows, columns) * each
    return values.astype(np.float32).reshape(*lead, *shape)


def place_fields(
    fields: Sequence[RowField], memory_dtype: str, rounding: str = "nearest"
) -> tuple[tuple[LayoutField, ...], int]:
    """The layout of a row in `memory_dtype` and its size in words. Adds the fields that the rounding needs.

    fields: the fields of the float32 row, in order.
    """
    _check(memory_dtype)
    if rounding not in ROUNDINGS:
        raise _invalid("rounding", ROUNDINGS, rounding)
    if memory_dtype == "float32" and rounding != "nearest":
        problem = f'contradicting attributes: rounding "{rounding}" with memory_dtype "float32"'
        raise TitansError("E0702", "memory_dtype", problem, "choose another memory_dtype")
    stored = [field for field in fields if field.kind in STORED_KINDS]
    rest = [field for field in fields if field.kind not in STORED_KINDS]
    if rounding == "error_feedback":
        for kind in ("weights", "surprise"):
            stored += [rounding_error_of(field) for field in fields if field.kind == kind]
    if rounding == "stochastic":
        rest.append(RowField("chunk_updates", (), "update_count"))
    placed: list[LayoutField] = []
    offset = 0
    for field, dtype in [*((f, memory_dtype) for f in stored), *((f, "float32") for f in rest)]:
        placed.append(field.at(offset, dtype))
        offset += placed[-1].words
    return tuple(placed), -(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT


def stored_layout(
    layout: Sequence[LayoutField], memory_dtype: str, rounding: str = "nearest"
) -> tuple[tuple[LayoutField, ...], int]:
    """The layout of a row in `memory_dtype` and its size in words, from the float32 layout of the same row."""
    return place_fields([RowField.from_layout(field) for field in layout], memory_dtype, rounding)


def unpack_row(row: Floats, layout: Sequence[PackedField]) -> dict[str, Floats]:
    """Unpacks rows (..., R) into fields, each (..., *shape). `chunk_updates` keeps its bits."""
    raw = np.ascontiguousarray(row, np.float32).view(np.uint32)
    return {
        field.name: unpack(
            raw[..., field.offset : field.offset + field_words(field.shape, field.dtype)], field.shape, field.dtype
        )
        for field in layout
    }


def pack_row(fields: Mapping[str, Floats], layout: Sequence[LayoutField], size: int) -> Floats:
    """Packs fields, each (..., *shape), into rows (..., size), rounded to nearest. Missing fields become zeros.

    With error feedback, missing error fields become the rounding errors of W and S.
    """
    shapes = {field.name: field.shape for field in layout}
    first = next(iter(fields))
    lead = np.shape(fields[first])[: np.ndim(fields[first]) - len(shapes[first])]
    raw = np.zeros((*lead, size), np.uint32)
    lost: dict[str, Floats] = {}  # by the field that was rounded
    for field in layout:
        name, shape, memory_dtype = field.name, field.shape, field.dtype
        value = fields.get(name, lost.get(field.of or ""))
        if value is None:
            continue
        values = np.asarray(value, np.float32).reshape(*lead, *matrix(shape))
        packed = pack(values, memory_dtype)
        begin = field.offset
        raw[..., begin : begin + packed.shape[-1]] = packed
        if memory_dtype != "float32":
            lost[name] = values.reshape(*lead, *shape) - unpack(packed, shape, memory_dtype)
    return raw.view(np.float32)
