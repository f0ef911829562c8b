"""Reads, makes and removes the initialisers of an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper

from .nodes import names_read

# Element types by their names in recipes, engines and manifests.
ELEMENT_TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
}
_BITS: dict[int, int] = {
    TensorProto.DOUBLE: 64, TensorProto.INT64: 64, TensorProto.FLOAT: 32, TensorProto.INT32: 32,
    TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.BOOL: 8, TensorProto.INT8: 8, TensorProto.UINT8: 8,
    TensorProto.FLOAT8E4M3FN: 8, TensorProto.INT4: 4,
}  # fmt: skip


def initializers_of(graph: GraphProto) -> dict[str, TensorProto]:
    """The graph's initialisers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def make_tensor(name: str, format: str, shape: Iterable[int], data: bytes) -> TensorProto:
    """An initialiser of type ELEMENT_TYPES[format] with these bytes."""
    return helper.make_tensor(name, ELEMENT_TYPES[format], list(shape), data, raw=True)


def float_tensor(name: str, format: str, values: NDArray[np.floating[Any]]) -> TensorProto:
    """An initialiser in float16 or bfloat16, rounded to nearest even. The caller checks the range."""
    data = values.astype(np.float16) if format == "float16" else to_bfloat16(values.astype(np.float32))
    return make_tensor(name, format, values.shape, data.tobytes())


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of finite float32 values in bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def tensor_bytes(shape: Iterable[int], element: int) -> int:
    """Size in bytes of a tensor of that ONNX element type. Unlisted types count as 4 bytes."""
    return -(-math.prod(shape) * _BITS.get(element, 32) // 8)


def replace_initializers(graph: GraphProto, tensors: Iterable[TensorProto]) -> None:
    """Makes `tensors` the graph's initialisers. They may already belong to the graph."""
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def drop_unread(graph: GraphProto) -> None:
    """Removes initialisers that no node and no output reads."""
    used = names_read(graph)
    replace_initializers(graph, [tensor for tensor in graph.initializer if tensor.name in used])
