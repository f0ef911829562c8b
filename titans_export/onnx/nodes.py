"""Reads and changes the nodes of an ONNX graph. Needs neither PyTorch nor ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, helper

from ..operators import DOMAIN, MEMORY_OPERATORS

ONNX_DOMAINS = ("", "ai.onnx")
_SHAPE_ONLY = frozenset(("Shape", "Size"))  # operators that do not read their input's values


def is_memory(node: NodeProto) -> bool:
    """Whether the node is one of the memory operators."""
    return bool(node.domain == DOMAIN and node.op_type in MEMORY_OPERATORS)


def is_memory_function(function: FunctionProto) -> bool:
    """Whether the function is a memory operator's body."""
    return bool(function.domain == DOMAIN and function.name in MEMORY_OPERATORS)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, with text as str; `default` if the node lacks it."""
    for entry in node.attribute:
        if entry.name == name:
            return _value(entry)
    return default


def attributes(node: NodeProto) -> dict[str, Any]:
    """All attributes by name, with text as str."""
    return {entry.name: _value(entry) for entry in node.attribute}


def _value(entry: AttributeProto) -> Any:
    value = helper.get_attribute_value(entry)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node: a loop's body, the branches of an If."""
    for entry in node.attribute:
        if entry.HasField("g"):
            yield entry.g
        yield from entry.graphs


def inner_nodes(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes inside a node's subgraphs, at any depth."""
    for graph in subgraphs(node):
        yield from all_nodes(graph)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The graph's nodes, each followed by its inner nodes."""
    for node in graph.node:
        yield node
        yield from inner_nodes(node)


def node_reads(node: NodeProto) -> set[str]:
    """All names that a node reads, including those read in its subgraphs."""
    found = set(node.input)
    for inner in subgraphs(node):
        found |= names_read(inner)
    return found


def names_read(graph: GraphProto) -> set[str]:
    """All names that the graph or a subgraph reads, including outputs."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found |= node_reads(node)
    return found


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """The producing node of each value of the graph, without subgraphs."""
    return {name: node for node in graph.node for name in node.output}


def readers_of(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes of the graph that read each value, in order, without subgraphs."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def ancestors(graph: GraphProto, node: NodeProto) -> set[str]:
    """First outputs of the nodes whose values the node depends on. Reading a shape is no dependency."""
    makers = makers_of(graph)
    found: set[str] = set()
    waiting = [makers[name] for name in node.input if name in makers]
    while waiting:
        maker = waiting.pop()
        if maker.output[0] not in found and maker.op_type not in _SHAPE_ONLY:
            found.add(maker.output[0])
            waiting += [makers[name] for name in maker.input if name in makers]
    return found


def copy_model(model: ModelProto) -> ModelProto:
    """An independent copy."""
    result = ModelProto()
    result.CopyFrom(model)
    return result


def copy_node(node: NodeProto) -> NodeProto:
    """An independent copy."""
    result = NodeProto()
    result.CopyFrom(node)
    return result


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Makes `nodes` the graph's nodes. They may already belong to the graph."""
    copies = [copy_node(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def replace_functions(model: ModelProto, functions: Iterable[FunctionProto]) -> None:
    """Makes `functions` the model's functions. They may already belong to the model."""
    copies = [FunctionProto.FromString(function.SerializeToString()) for function in functions]
    del model.functions[:]
    model.functions.extend(copies)
