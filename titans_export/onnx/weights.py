"""Shares weights: the large initialisers of all graphs are in one safetensors file that the graphs reference."""

from __future__ import annotations

from pathlib import Path

import onnx
import xxhash
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data

from ..safetensors_file import Array, Raw, blocks_of, write_safetensors
from .initializers import replace_initializers
from .nodes import subgraphs

SHARED_BYTES = 1024  # smaller initialisers stay in their graph
PARAMETER_PREFIX = "model."
# Safetensors lacks 4-bit types, so two int4 values are stored as one byte.
_RAW: dict[int, str] = {TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "F8_E4M3", TensorProto.INT4: "U8"}


def stored(tensor: TensorProto) -> Array | Raw:
    """The initialiser in the form stored in weights.safetensors."""
    if tensor.data_type not in _RAW:
        return numpy_helper.to_array(tensor)
    data = tensor.raw_data
    shape = (len(data),) if tensor.data_type == TensorProto.INT4 else tuple(tensor.dims)
    return Raw(_RAW[tensor.data_type], shape, data)


def share_weights(
    models: dict[str, onnx.ModelProto], path: Path, named: str | None = PARAMETER_PREFIX
) -> dict[str, list[str]]:
    """Moves the models' large initialisers to `path`; the graphs will lie in the same folder. models: by graph name.

    Initialisers whose names begin with `named` (parameters) keep their names. Others are named by content, so equal
    ones merge. Initialisers already in a file stay there. Returns the shared initialisers' names by graph.
    """
    values: dict[str, Array | Raw] = {}
    names: dict[str, list[str]] = {}
    for graph, model in models.items():
        renamed = {}
        elsewhere = set()
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                elsewhere.add(tensor.name)
                continue
            value = stored(tensor)
            if value.nbytes < SHARED_BYTES:
                continue
            if named is None or not tensor.name.startswith(named):
                content = xxhash.xxh3_64(f"{value.dtype}{value.shape}".encode())
                for block in blocks_of(value):
                    content.update(block)
                renamed[tensor.name] = f"constant.{content.hexdigest()}"
                tensor.name = renamed[tensor.name]
            values[tensor.name] = value
        _rename(model.graph, renamed)
        names[graph] = sorted({t.name for t in model.graph.initializer} & (set(values) | elsewhere))
        _drop_twins(model.graph)
    offsets = write_safetensors(path, values)
    for model in models.values():
        for tensor in model.graph.initializer:
            if tensor.name in offsets:
                _point(tensor, path.name, offsets[tensor.name], values[tensor.name].nbytes)
    return names


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Renames reads of initialisers, including captured ones in subgraphs."""
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for inner in subgraphs(node):
            own = {value.name for value in (*inner.input, *inner.initializer)}
            own |= {name for made in inner.node for name in made.output}
            _rename(inner, {old: new for old, new in renamed.items() if old not in own})


def _drop_twins(graph: onnx.GraphProto) -> None:
    """Removes duplicates of a name, which result from equal constants."""
    unique = {tensor.name: tensor for tensor in graph.initializer}
    kept = [unique[name] for name in dict.fromkeys(t.name for t in graph.initializer)]
    if len(kept) < len(graph.initializer):
        replace_initializers(graph, kept)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
