"""Memories that hold W and S in fewer bits: their nodes, their state in the manifest and the fresh state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from titans_calibration.matmuls import QuantiseError
from titans_export.model.memory_dtype import pack_row, stored_layout, unpack_row
from titans_export.onnx.nodes import is_memory, is_memory_function, names_read, replace_functions, subgraphs

if TYPE_CHECKING:
    from titans_calibration.recipe import MemoryRecipe

_STATE, _STATE_OUT = 0, 1  # a node's rows, in and out


def store_memories(
    models: Mapping[str, ModelProto], state: Sequence[Mapping[str, Any]], memory: MemoryRecipe
) -> list[dict[str, Any]]:
    """Changes the graphs to the recipe's memory_dtype, and returns the manifest's state as it is then.

    Raises QuantiseError where a memory is not the operator's own.
    """
    result: list[dict[str, Any]] = []
    for entry in state:
        if entry["role"] != "memory":
            result.append(dict(entry))
            continue
        if not entry.get("layout"):
            raise _foreign(entry["name"], "one without a layout")
        layout, size = stored_layout(entry["layout"], memory.dtype, memory.rounding)
        result.append({**entry, "shape": [*entry["shape"][:-1], size], "layout": layout})
    sizes = {entry["input"]: entry["shape"][-1] for entry in result if entry["role"] == "memory"}
    if not sizes:
        raise QuantiseError("quantize", "a memory", "a bundle without one", "take a recipe without [memory]")
    outputs = {entry["input"]: entry["output"] for entry in result if entry["role"] == "memory"}
    for model in models.values():
        _store(model, sizes, outputs, memory)
    return result


def store_rows(
    initial: Mapping[str, NDArray[np.float32]], before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, NDArray[np.float32]]:
    """The fresh state in the new layouts, rounded to the nearest."""
    rows = dict(initial)
    for old, new in zip(before, after, strict=True):
        if old["role"] == "memory":
            fields = unpack_row(initial[old["name"]], old["layout"])
            rows[old["name"]] = pack_row(fields, new["layout"], new["shape"][-1])
    return rows


def _foreign(name: str, got: str) -> QuantiseError:
    return QuantiseError(
        "quantize", f"the memory {name} to be the operator NeuralMemory's", got, 'take memory.dtype "float32"'
    )


def _store(model: ModelProto, sizes: Mapping[str, int], outputs: Mapping[str, str], memory: MemoryRecipe) -> None:
    graph = model.graph
    rows = dict(sizes)  # every value that is packed rows, with its new extent
    origin = {name: name for name in sizes}
    seeds = {name: (memory.seed + i) % 2**32 for i, name in enumerate(sizes)}  # memories do not share their noise
    inner = {name for node in graph.node for g in subgraphs(node) for name in names_read(g)}
    for node in graph.node:
        places = [place for place, name in enumerate(node.input) if name in rows]
        if not places:
            if is_memory(node):
                raise _foreign(node.name, "a node whose rows come from elsewhere")
            continue
        source = node.input[_STATE]
        if not is_memory(node) or places != [_STATE]:
            name = node.input[places[0]]
            raise _foreign(origin[name], f"one that {node.op_type} node {node.name!r} reads")
        _mark(node, memory, seeds[origin[source]])
        if len(node.output) > _STATE_OUT and node.output[_STATE_OUT]:
            rows[node.output[_STATE_OUT]], origin[node.output[_STATE_OUT]] = rows[source], origin[source]
    for name in sizes:
        if name in inner:
            raise _foreign(name, "one that a branch reads")
        if rows.get(outputs[name]) is None:
            raise _foreign(name, f"{outputs[name]!r} made by another operator")
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name in rows:
            value.type.tensor_type.shape.dim[-1].dim_value = rows[value.name]
    replace_functions(model, [function for function in model.functions if not is_memory_function(function)])


def _mark(node: NodeProto, memory: MemoryRecipe, seed: int) -> None:
    """The attributes of docs/operator.md, and no function body."""
    node.ClearField("overload")
    others = [entry for entry in node.attribute if entry.name not in ("memory_dtype", "rounding", "seed")]
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in others]
    del node.attribute[:]
    node.attribute.extend(copies)
    node.attribute.append(helper.make_attribute("memory_dtype", memory.dtype))
    if memory.rounding != "nearest":
        node.attribute.append(helper.make_attribute("rounding", memory.rounding))
    if memory.rounding == "stochastic":
        node.attribute.append(helper.make_attribute("seed", seed))
