"""Low-precision memories: their nodes, their state in the manifest and the initial state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from titans_calibration.matmuls import QuantiseError
from titans_export.manifest import StateTensor
from titans_export.model.memory_dtype import pack_row, stored_layout, unpack_row
from titans_export.onnx.nodes import is_memory, is_memory_function, names_read, replace_functions, subgraphs

if TYPE_CHECKING:
    from titans_calibration.recipe import MemoryRecipe
    from titans_calibration.source import Source

_STATE, _STATE_OUT = 0, 1  # a node's rows, in and out


def store_memories(
    models: Mapping[str, ModelProto], state: Sequence[StateTensor], memory: MemoryRecipe
) -> tuple[StateTensor, ...]:
    """Changes the graphs to the recipe's memory dtype, and returns the manifest's state for them.

    Raises QuantiseError if a memory's rows are read or made by another operator.
    """
    result = _stored_state(state, memory)
    flows = {name: _follow(model, result) for name, model in models.items()}
    for name, model in models.items():
        _store(model, flows[name], memory)
    return result


def check_memories(source: Source, memory: MemoryRecipe) -> None:
    """Raises QuantiseError if `store_memories` would refuse the bundle."""
    if memory.dtype != "float32":
        state = _stored_state(source.bundle.manifest.state, memory)
        for model in source.structures.values():
            _follow(model, state)


def _stored_state(state: Sequence[StateTensor], memory: MemoryRecipe) -> tuple[StateTensor, ...]:
    """The manifest's state with memories in the recipe's dtype."""
    result: list[StateTensor] = []
    for entry in state:
        if entry.role != "memory":
            result.append(entry)
            continue
        if not entry.layout:
            raise _foreign(entry.name, "the manifest has no layout for it")
        layout, size = stored_layout(entry.layout, memory.dtype, memory.rounding)
        result.append(replace(entry, shape=(*entry.shape[:-1], size), layout=layout))
    if all(entry.role != "memory" for entry in result):
        raise QuantiseError("E0810", "quantize", "the bundle has no memory", "take a recipe without [memory]")
    return tuple(result)


def store_rows(
    initial: Mapping[str, NDArray[np.float32]], before: Sequence[StateTensor], after: Sequence[StateTensor]
) -> dict[str, NDArray[np.float32]]:
    """The initial state in the new layouts, rounded to nearest."""
    rows = dict(initial)
    for old, new in zip(before, after, strict=True):
        if old.role == "memory":
            fields = unpack_row(initial[old.name], old.layout)
            rows[old.name] = pack_row(fields, new.layout, new.shape[-1])
    return rows


def _foreign(name: str, reason: str) -> QuantiseError:
    problem = f"the memory {name} cannot change its dtype, as it is not NeuralMemory's own: {reason}"
    return QuantiseError("E0810", "quantize", problem, 'take memory.dtype "float32"')


@dataclass(frozen=True)
class _Flow:
    """Memory rows in one graph. rows: new extent by value. nodes: index and number of the memory."""

    rows: dict[str, int]
    nodes: dict[int, int]


def _follow(model: ModelProto, state: Sequence[StateTensor]) -> _Flow:
    """Follows each memory's rows through the graph. Raises QuantiseError if another operator reads or makes them."""
    graph = model.graph
    memories = [entry for entry in state if entry.role == "memory"]
    rows = {entry.input: entry.shape[-1] for entry in memories}
    origin = {entry.input: number for number, entry in enumerate(memories)}
    nodes: dict[int, int] = {}
    captured = {name for node in graph.node for inner in subgraphs(node) for name in names_read(inner)}
    for index, node in enumerate(graph.node):
        places = [place for place, name in enumerate(node.input) if name in rows]
        if not places:
            if is_memory(node):
                raise _foreign(node.name, "its rows are no state of the manifest")
            continue
        number = origin[node.input[places[0]]]
        if not is_memory(node) or places != [_STATE]:
            raise _foreign(memories[number].input, f"the {node.op_type} node {node.name!r} reads it")
        nodes[index] = number
        if len(node.output) > _STATE_OUT and node.output[_STATE_OUT]:
            rows[node.output[_STATE_OUT]], origin[node.output[_STATE_OUT]] = rows[node.input[_STATE]], number
    for entry in memories:
        if entry.input in captured:
            raise _foreign(entry.input, "a branch reads it")
        if entry.output not in rows:
            raise _foreign(entry.input, f"another operator makes {entry.output!r}")
    return _Flow(rows, nodes)


def _store(model: ModelProto, flow: _Flow, memory: MemoryRecipe) -> None:
    graph = model.graph
    for index, number in flow.nodes.items():
        _mark(graph.node[index], memory, (memory.seed + number) % 2**32)  # memories do not share their noise
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name in flow.rows:
            value.type.tensor_type.shape.dim[-1].dim_value = flow.rows[value.name]
    replace_functions(model, [function for function in model.functions if not is_memory_function(function)])


def _mark(node: NodeProto, memory: MemoryRecipe, seed: int) -> None:
    """Sets the attributes of docs/operator.md; the node needs a kernel then, so it loses its function body."""
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
