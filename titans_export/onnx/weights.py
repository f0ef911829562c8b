"""Shares weights: the large initialisers of all graphs are in one safetensors file that the graphs reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import xxhash
from onnx.external_data_helper import uses_external_data

from ..progress import Advance
from ..safetensors_file import Array, Raw, blocks_of, write_safetensors
from .initializers import replace_initializers
from .mapped import SMALL_BYTES, is_mapped, point_to, value_of
from .nodes import subgraphs

PARAMETER_PREFIX = "model."


def share_weights(
    models: dict[str, onnx.ModelProto],
    path: Path,
    named: str | None = PARAMETER_PREFIX,
    large: Mapping[str, Mapping[str, Array]] | None = None,
    advance: Advance = lambda size: None,
) -> dict[str, list[str]]:
    """Moves the models' large initialisers to `path`; the graphs will lie in the same folder. models: by graph name.

    large: by graph, values that `take_large` of parameters.py took out of its model. Initialisers whose names begin
    with `named` (parameters) keep their names. Others are named by content, so equal ones merge. References with
    relative paths stay; mapped ones are copied to `path`. advance: takes the bytes of each write. Returns the shared
    initialisers' names by graph.
    """
    values: dict[str, Array | Raw] = {}
    names: dict[str, list[str]] = {}
    for graph, model in models.items():
        renamed = {}
        elsewhere = set()
        for tensor in model.graph.initializer:
            taken = (large or {}).get(graph, {}).get(tensor.name)
            if taken is None and uses_external_data(tensor) and not is_mapped(tensor):
                elsewhere.add(tensor.name)
                continue
            value = value_of(tensor) if taken is None else taken
            if value.nbytes < SMALL_BYTES:
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
    offsets = write_safetensors(path, values, advance)
    for model in models.values():
        for tensor in model.graph.initializer:
            if tensor.name in offsets:
                point_to(tensor, path.name, offsets[tensor.name], values[tensor.name].nbytes)
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
