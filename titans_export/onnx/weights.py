"""Weights stored once: the large initialisers of all graphs in one safetensors file that the graphs point into."""

from __future__ import annotations

from pathlib import Path

import onnx
import xxhash
from onnx import TensorProto, numpy_helper

from ..safetensors_file import Array, Raw, write_safetensors

SHARED_BYTES = 1024  # smaller initialisers stay inside their graph
PARAMETER_PREFIX = "model."
# Safetensors has no numbers of four bits: two of them are one of its bytes.
_RAW: dict[int, str] = {TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "F8_E4M3", TensorProto.INT4: "U8"}


def stored(tensor: TensorProto) -> Array | Raw:
    """The initialiser as weights.safetensors holds it."""
    if tensor.data_type not in _RAW:
        return numpy_helper.to_array(tensor)
    data = tensor.raw_data
    shape = (len(data),) if tensor.data_type == TensorProto.INT4 else tuple(tensor.dims)
    return Raw(_RAW[tensor.data_type], shape, data)


def share_weights(models: dict[str, onnx.ModelProto], path: Path) -> dict[str, list[str]]:
    """Moves the large initialisers of the models, by graph name, to `path`, beside which the graphs will lie.

    Parameters keep their names. Constants that the exporter made from them are named by their content, so that equal
    ones of different graphs are one. Returns the names of each graph's shared initialisers.
    """
    values: dict[str, Array | Raw] = {}
    names: dict[str, list[str]] = {}
    for graph, model in models.items():
        renamed = {}
        for tensor in model.graph.initializer:
            value = stored(tensor)
            if value.nbytes < SHARED_BYTES:
                continue
            if not tensor.name.startswith(PARAMETER_PREFIX):
                data = value.data if isinstance(value, Raw) else value.tobytes()
                content = xxhash.xxh3_64_hexdigest(f"{value.dtype}{value.shape}".encode() + data)
                renamed[tensor.name] = f"constant.{content}"
                tensor.name = renamed[tensor.name]
            values[tensor.name] = value
        for node in model.graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
        names[graph] = sorted({t.name for t in model.graph.initializer} & set(values))
        _drop_twins(model.graph)
    offsets = write_safetensors(path, values)
    for model in models.values():
        for tensor in model.graph.initializer:
            if tensor.name in offsets:
                _point(tensor, path.name, offsets[tensor.name], values[tensor.name].nbytes)
    return names


def _drop_twins(graph: onnx.GraphProto) -> None:
    """Keeps one initialiser of each name: constants of equal content have become one."""
    unique = {tensor.name: tensor for tensor in graph.initializer}
    kept = [unique[name] for name in dict.fromkeys(t.name for t in graph.initializer)]
    if len(kept) < len(graph.initializer):
        copies = [TensorProto.FromString(t.SerializeToString()) for t in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
