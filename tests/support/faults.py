"""Alters single nodes and constants of a bundle's graphs, as a defect of an exporter or a damaged file would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
import xxhash
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from titans_export.onnx.files import load_structure
from titans_export.onnx.nodes import attribute, copy_model, is_memory, subgraphs

Array = NDArray[Any]
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
# Operators of the same number of inputs that compute something else.
EXCHANGED = {
    "Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "Pow": "Mul", "Max": "Min", "Min": "Max",
    "Sigmoid": "Tanh", "Tanh": "Sigmoid", "Softplus": "Relu", "Relu": "Softplus", "Exp": "Softplus",
    "Cos": "Sin", "Sin": "Cos", "Sqrt": "Identity", "Neg": "Identity", "Abs": "Identity", "Not": "Identity",
    "Reciprocal": "Identity", "Erf": "Tanh", "Log": "Identity",
    "ReduceMean": "ReduceSum", "ReduceSum": "ReduceMean", "ReduceMax": "ReduceMin", "Softmax": "LogSoftmax",
    "LessOrEqual": "Less", "GreaterOrEqual": "Greater", "Less": "LessOrEqual", "Greater": "GreaterOrEqual",
    "And": "Or", "Or": "And", "Equal": "Less", "IsNaN": "IsInf",
}  # fmt: skip
# Positions of two inputs that are not alike.
SWAPPED = {"Sub": (0, 1), "Div": (0, 1), "Pow": (0, 1), "Where": (1, 2), "Concat": (0, 1), "MatMul": (0, 1),
           "LessOrEqual": (0, 1), "GreaterOrEqual": (0, 1), "Less": (0, 1), "Mod": (0, 1)}  # fmt: skip


class Fault(NamedTuple):
    """One alteration. kind: what is altered and how. where: the node or constant. apply: alters a copy of the graph."""

    graph: str
    kind: str
    where: str
    apply: Callable[[ModelProto], None]

    def __str__(self) -> str:
        return f"{self.graph}: {self.kind} of {self.where}"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _types(model: ModelProto) -> dict[str, int]:
    """Element types of values by name."""
    inferred = onnx.shape_inference.infer_shapes(copy_model(model))
    found: dict[str, int] = {}
    for graph in (*_graphs(inferred.graph), *_graphs(model.graph)):
        for value in (*graph.input, *graph.output, *graph.value_info):
            found.setdefault(value.name, value.type.tensor_type.elem_type)
    return found


def _node(model: ModelProto, name: str) -> tuple[GraphProto, int, NodeProto]:
    """The node whose first output has that name, and its place."""
    for graph in _graphs(model.graph):
        for index, node in enumerate(graph.node):
            if next(filter(None, node.output), "") == name:
                return graph, index, node
    raise KeyError(name)


# ---- alterations; each takes the name of a node's first output or of a constant ----


def _rename(name: str, op_type: str) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        node = _node(model, name)[2]
        if op_type in ("Identity", "Sub", "Mul", "Relu", "Softplus", "Tanh"):
            del node.attribute[:]
            del node.input[2:]
        node.op_type = op_type

    return apply


def _swap(name: str, one: int, other: int) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        given = _node(model, name)[2].input
        given[one], given[other] = given[other], given[one]

    return apply


def _changed(name: str, output: str, element: int) -> Callable[[ModelProto], None]:
    """Changes an output by its type: negative values shrink and 0.01 is added, so that no norm hides it; plus one;
    negated.
    """
    made = output + ".right"

    def apply(model: ModelProto) -> None:
        graph, index, node = _node(model, name)
        node.output[list(node.output).index(output)] = made
        by = np.array(0.01, np.float32) if element == FLOAT else np.array(1, np.int64)
        added = []
        if element == BOOL:
            added.append(helper.make_node("Not", [made], [output]))
        else:
            added.append(helper.make_node("Constant", [], [made + ".by"], value=numpy_helper.from_array(by)))
            if element == FLOAT:
                added.append(helper.make_node("LeakyRelu", [made], [made + ".bent"], alpha=0.9))
            added.append(
                helper.make_node("Add", [added[-1].output[0] if element == FLOAT else made, made + ".by"], [output])
            )
        for step, one in enumerate(added, 1):
            graph.node.insert(index + step, one)

    return apply


def _attribute(name: str, key: str, value: Any) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        node = _node(model, name)[2]
        kept = [entry for entry in node.attribute if entry.name != key]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(key, value)])

    return apply


def _constant(name: str, value: Array) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        for graph in _graphs(model.graph):
            for tensor in graph.initializer:
                if tensor.name == name:
                    tensor.CopyFrom(numpy_helper.from_array(value, name))
                    return
            for node in graph.node:
                if node.op_type == "Constant" and node.output[0] == name:
                    node.attribute[0].t.CopyFrom(numpy_helper.from_array(value))
                    return
        raise KeyError(name)

    return apply


# ---- finding them ----


def _of_node(node: NodeProto, types: dict[str, int]) -> Iterator[tuple[str, Callable[[ModelProto], None]]]:
    name, kind = next(filter(None, node.output), ""), node.op_type
    if not name or kind == "Constant":
        return
    if kind in EXCHANGED and len(node.input) <= 2:
        yield f"{kind} as {EXCHANGED[kind]}", _rename(name, EXCHANGED[kind])
    if kind in SWAPPED and max(SWAPPED[kind]) < len(node.input):
        yield f"swapped inputs of {kind}", _swap(name, *SWAPPED[kind])
    for index, output in enumerate(node.output):
        if output and types.get(output) in (FLOAT, INT64, BOOL):
            word = {FLOAT: "bent", INT64: "off by one", BOOL: "negated"}[types[output]]
            yield (
                f"{word} output {index if len(node.output) < 4 else ''} of {kind}",
                _changed(name, output, types[output]),
            )
    for entry in node.attribute:
        yield from _of_attribute(node, name, entry)


def _of_attribute(
    node: NodeProto, name: str, entry: AttributeProto
) -> Iterator[tuple[str, Callable[[ModelProto], None]]]:
    label = f"attribute {entry.name} of {node.op_type}"
    if entry.type == AttributeProto.INT:
        choices = [entry.i + 1, max(entry.i - 1, 0)] if is_memory(node) else [entry.i - 1 if entry.i else 1]
        for value in {*choices} - {entry.i}:
            yield label, _attribute(name, entry.name, value)
    elif entry.type == AttributeProto.FLOAT:
        factor = 1000 if "eps" in entry.name else 1.5
        yield label, _attribute(name, entry.name, entry.f * factor)
    elif entry.type == AttributeProto.INTS and len(entry.ints) > 1:
        yield label, _attribute(name, entry.name, [*list(entry.ints)[1::-1], *list(entry.ints)[2:]])


def _of_constant(value: Array, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """Kinds of faults and the altered constants."""
    if value.dtype == np.int64:
        yield f"off by one in int64 {list(value.shape) if value.ndim < 2 else 'array'}", value + 1
    elif value.dtype == np.bool_:
        yield "negated constant", ~value
    elif value.dtype == np.float32 and value.size == 1:
        if 0 < abs(float(value.flat[0])) < 1e-4:
            yield "epsilon", value * np.float32(1000)
        else:
            yield "scalar", value * np.float32(1.25) + np.float32(0.01)
    elif value.dtype == np.float32 and value.size:
        at, column = int(rng.integers(value.size)), int(rng.integers(value.shape[-1]))
        flipped = value.copy()
        flipped.flat[at] = -flipped.flat[at]
        yield f"flipped sign in {value.ndim} dimensions", flipped
        moved = value.copy()
        if value.ndim > 1:
            moved[..., column] *= 1.25
            yield f"scaled column in {value.ndim} dimensions", moved
        else:
            moved[at] += 0.25
            yield "moved element of a vector", moved


def faults_of(bundle: Path, name: str, rng: np.random.Generator, count: int = 1) -> list[Fault]:
    """Up to `count` faults of each kind in a graph."""
    model = load_structure(bundle / f"{name}.onnx")
    types = _types(model)
    kinds: dict[str, list[Fault]] = {}
    for graph in _graphs(model.graph):
        for node in graph.node:
            where = next(filter(None, node.output), "")
            for kind, apply in _of_node(node, types):
                kinds.setdefault(kind, []).append(Fault(name, kind, where, apply))
        constants = {tensor.name: tensor for tensor in graph.initializer}
        constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        for key, tensor in constants.items():
            for kind, value in _of_constant(numpy_helper.to_array(tensor, str(bundle)), rng):
                kinds.setdefault(kind, []).append(Fault(name, kind, key, _constant(key, value)))
    chosen = []
    for own in kinds.values():
        picked = rng.choice(len(own), min(count, len(own)), replace=False)
        chosen += [own[int(index)] for index in sorted(picked)]
    return chosen


def altered_graph(bundle: Path, fault: Fault) -> ModelProto:
    """The graph with the fault. An altered weight is inside of it."""
    model = load_structure(bundle / f"{fault.graph}.onnx")
    fault.apply(model)
    return model


def is_valid(model: ModelProto) -> bool:
    """Whether operators, attributes and shapes fit together by ONNX's own rules. Others never reach a computation."""
    for graph in _graphs(model.graph):
        for node in graph.node:
            # ONNX does not check this, and ONNX Runtime aborts the process.
            if node.op_type == "Split" and attribute(node, "num_outputs", len(node.output)) != len(node.output):
                return False
    try:
        inlined = onnx.inliner.inline_local_functions(copy_model(model))
        onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        return False
    return True


@contextmanager
def altered(bundle: Path, name: str, model: ModelProto) -> Iterator[None]:
    """A context in which the bundle has another graph, with a manifest that fits."""
    graph, manifest = bundle / f"{name}.onnx", bundle / "manifest.json"
    before = graph.read_bytes(), manifest.read_bytes()
    raw, entries = model.SerializeToString(), json.loads(before[1])
    external = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    for entry in entries["graphs"]:
        if entry["name"] == name:
            entry["weights"] = [weight for weight in entry["weights"] if weight in external]
    entries["files"][graph.name] = {"bytes": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    graph.write_bytes(raw), manifest.write_text(json.dumps(entries))
    try:
        yield
    finally:
        graph.write_bytes(before[0]), manifest.write_bytes(before[1])
