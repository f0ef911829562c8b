"""Graphs for any number of streams.

A graph is traced for a number of streams that occurs nowhere else in it: a prime that divides no dimension of the
model. `free_streams` then replaces that number by a symbol, so a place that depends on it cannot be missed. Nodes
compute a shape only for constants that repeat for each stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from .nodes import all_nodes, subgraphs

STREAMS, SLOTS = "streams", "slots"  # symbolic dimensions: rows of a call, and rows of a pool of states
_FIRST_PRIME = 101  # smaller ones occur by chance, such as in the padding of a packed row


def _primes() -> Iterator[int]:
    found: list[int] = []
    number = 2
    while True:
        if all(number % prime for prime in found):
            found.append(number)
            yield number
        number += 1


Numbers = tuple[int, int]  # of streams and of slots that a graph is traced for


def unlikely_numbers(dimensions: Iterable[int]) -> Numbers:
    """Two primes that divide none of the dimensions: the numbers of streams and of slots to trace with."""
    sizes = set(dimensions)
    free = (prime for prime in _primes() if prime >= _FIRST_PRIME and all(size % prime for size in sizes if size))
    return next(free), next(free)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and its subgraphs, at any depth."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Constants of the graph and its subgraphs by name: small initialisers and values of Constant nodes."""
    found: dict[str, TensorProto] = {}
    for inner in _graphs(graph):
        found |= {t.name: t for t in inner.initializer}
        for node in inner.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                found[node.output[0]] = node.attribute[0].t
    return found


class _Symbols:
    """The two traced numbers and their symbols."""

    def __init__(self, streams: int, slots: int) -> None:
        self.by_number = {streams: STREAMS, slots: SLOTS}

    def depends(self, number: int) -> bool:
        """Whether a dimension depends on the number of streams or slots."""
        return number > 0 and any(number % traced == 0 for traced in self.by_number)

    def free(self, type_: TypeProto) -> None:
        """Replaces the numbers in the shape of a value; a multiple becomes an unknown dimension."""
        for dim in type_.tensor_type.shape.dim:
            if self.depends(dim.dim_value):
                symbol = self.by_number.get(dim.dim_value)
                dim.Clear()
                if symbol is not None:
                    dim.dim_param = symbol


class _Freed:
    """A traced graph whose shapes are being replaced."""

    def __init__(self, graph: GraphProto, symbols: _Symbols) -> None:
        self.graph, self.symbols = graph, symbols
        self.expanded: dict[str, TensorProto] = {}  # constants that nodes repeat for each stream
        self.computed: dict[str, list[int]] = {}  # shapes that nodes compute
        self.known: dict[str, list[int]] = {}  # the shapes of values, as traced
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        self.outputs = {value.name for inner in _graphs(graph) for value in inner.output}
        for inner in _graphs(graph):
            for value in (*inner.input, *inner.output, *inner.value_info):
                self.known[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for node in all_nodes(graph):
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))

    def replace(self, name: str, tensor: TensorProto) -> None:
        """Replaces the numbers in a constant: in its own shape, and in its values if it is the shape of a node."""
        if any(self.symbols.depends(dim) for dim in tensor.dims):
            self._shrink(name, tensor)
        readers = self.readers.get(name, [])
        if tensor.data_type != TensorProto.INT64 or not any((node.op_type, at) in _SHAPES for node, at in readers):
            return
        shape = numpy_helper.to_array(tensor).reshape(-1).tolist()
        if not any(self.symbols.depends(number) for number in shape):
            return
        if any(node.op_type == "Expand" and not self._keeps_own(node, shape) for node, _ in readers):
            if any(map(self.symbols.depends, shape[1:])) or shape[0] not in self.symbols.by_number:
                raise ValueError(f"an Expand repeats its input for each stream, but not in front: {shape}")
            self.computed[name] = shape
            return
        # Nodes whose inputs differ need different shapes.
        found: dict[tuple[int, ...], list[tuple[NodeProto, int]]] = {}
        for node, at in readers:
            found.setdefault(tuple(self._free(node, at, shape)), []).append((node, at))
        for number, (freed, nodes) in enumerate(found.items()):
            made = helper.make_tensor(
                f"{name}.{number}" if number else tensor.name, TensorProto.INT64, [len(freed)], freed
            )
            if number == 0:
                tensor.CopyFrom(made)
                continue
            self.graph.initializer.append(made)
            for node, at in nodes:
                node.input[at] = made.name

    def _shrink(self, name: str, tensor: TensorProto) -> None:
        """Leaves one of the equal parts that a folded constant has for the streams. Its readers broadcast it, or a node
        repeats it.
        """
        values, dims = numpy_helper.to_array(tensor), list(tensor.dims)
        for axis, size in enumerate(dims):
            if self.symbols.depends(size):
                first = values.take([0], axis)
                if axis or size not in self.symbols.by_number or not (values == first).all():
                    raise ValueError(f"constant {name} depends on the number of streams: its shape is {dims}")
                values = first
        readers = self.readers.get(name, [])
        if name in self.outputs or any(node.op_type not in _BROADCASTING for node, _ in readers):
            self.expanded[name] = numpy_helper.from_array(numpy_helper.to_array(tensor), name)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    def insert_nodes(self) -> None:
        """Adds the nodes that repeat constants for each stream and compute shapes, in place of those constants."""
        # Inner graphs first, as moving the nodes of a graph copies them.
        for inner in reversed(list(_graphs(self.graph))):
            constants = {tensor.name for tensor in inner.initializer}
            constants |= {node.output[0] for node in inner.node if node.op_type == "Constant"}
            chosen = sorted(constants & (self.expanded.keys() | self.computed.keys()))
            if not chosen:
                continue
            kept = [tensor for tensor in inner.initializer if tensor.name not in chosen]
            others = [node for node in inner.node if node.output[0] not in chosen]
            del inner.initializer[:]
            inner.initializer.extend(kept)
            nodes = []
            for name in chosen:
                if name in self.computed:
                    nodes += self._shape(inner, name, self.computed[name])
                else:
                    nodes += self._expansion(inner, name, self.expanded[name])
            del inner.node[:]
            inner.node.extend([*nodes, *others])

    def _shape(self, inner: GraphProto, name: str, traced: Sequence[int]) -> list[NodeProto]:
        """Nodes of a graph that compute a shape whose first dimension is the number of streams or slots."""
        given = next(value.name for value in self.graph.input if self.known[value.name][:1] == [traced[0]])
        rest, count = f"{name}.rest", f"{name}.count"
        inner.initializer.append(numpy_helper.from_array(np.array(traced[1:], np.int64), rest))
        return [
            helper.make_node("Shape", [given], [count], end=1),
            helper.make_node("Concat", [count, rest], [name], axis=0),
        ]

    def _expansion(self, inner: GraphProto, name: str, traced: TensorProto) -> list[NodeProto]:
        """Nodes of a graph that repeat the first part of a constant for each stream."""
        one, shape = f"{name}.one", f"{name}.shape"
        inner.initializer.append(numpy_helper.from_array(numpy_helper.to_array(traced)[:1], one))
        return [*self._shape(inner, shape, traced.dims), helper.make_node("Expand", [one, shape], [name])]

    def _free(self, node: NodeProto, index: int, shape: list[int]) -> list[int]:
        """The shape that the node reads as operand `index`, for any number of streams."""
        if (node.op_type, index) == ("Reshape", 1):
            return self._of_reshape(node, shape)
        if (node.op_type, index) == ("Expand", 1):
            # 1 keeps the input's own dimension.
            return [1 if self.symbols.depends(number) else number for number in shape]
        raise ValueError(f"a {node.op_type} reads a shape that depends on the number of streams: {shape}")

    def _of_reshape(self, node: NodeProto, shape: list[int]) -> list[int]:
        """0, the input's own dimension, in front; else -1, what is left."""
        freed = list(shape)
        for axis, number in enumerate(shape):
            if self.symbols.depends(number):
                given = self.known.get(node.input[0], [])
                own = number in self.symbols.by_number and given[axis : axis + 1] == [number]
                freed[axis] = 0 if own else -1
        if freed.count(-1) > 1 and -1 in shape:
            result = self.known.get(node.output[0], [])
            rest = shape.index(-1)
            if len(result) == len(shape) and result[rest] and not self.symbols.depends(result[rest]):
                freed[rest] = result[rest]  # what was left to the node when it was traced
        if freed.count(-1) > 1:
            raise ValueError(f"shape {shape} depends on the number of streams in two places")
        if 0 in freed:
            # By this attribute a 0 would be a dimension of no elements.
            kept = [entry for entry in node.attribute if entry.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
        return freed

    def _keeps_own(self, expand: NodeProto, shape: list[int]) -> bool:
        """Whether an Expand's input has the dimensions that depend on the number of streams already."""
        given = self.known.get(expand.input[0], [])
        given = [1] * (len(shape) - len(given)) + given
        return all(own == number for own, number in zip(given, shape, strict=True) if self.symbols.depends(number))


def free_streams(model: onnx.ModelProto, streams: int, slots: int) -> None:
    """Replaces the numbers of streams and slots in a traced graph by the symbols STREAMS and SLOTS.

    Raises ValueError for a place that holds such a number and cannot be replaced.
    """
    symbols = _Symbols(streams, slots)
    freed = _Freed(model.graph, symbols)
    for name, tensor in _constants(model.graph).items():
        freed.replace(name, tensor)
    freed.insert_nodes()
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            symbols.free(value.type)


def fix_streams(model: onnx.ModelProto, slots_input: str, streams: int) -> None:
    """Gives a graph a fixed number of streams, for compilers that need it: stream b has row b of the pools, and the
    input of slots becomes a constant.
    """
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in (STREAMS, SLOTS):
                    dim.dim_value = streams
    kept = [value for value in model.graph.input if value.name != slots_input]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(streams), slots_input))


# Operators whose operands broadcast each other.
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_ARITHMETIC = ("Add", "Div", "Max", "Min", "Mod", "Mul", "Pow", "Sub")
_BROADCASTING = frozenset((*_COMPARISONS, *_ARITHMETIC, "And", "Or", "Where"))
# Operands that are shapes or numbers of repeats.
_SHAPES = {("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0), ("Range", 1)}
