"""Unrolls Scans with branches in their bodies: one copy of the body per step.

TensorRT-RTX 1.7 builds If, Scan as a loop, and small branches within loops. It fails on a memory's whole update in such
a branch ("No nesting relationship").
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from ..errors import BundleError
from ..onnx.nodes import attributes, copy_model, copy_node, replace_nodes, subgraphs


def unroll_scans(model: ModelProto) -> ModelProto:
    """A copy whose main graph has no Scan with branches. Raises BundleError if a Scan's length is unknown."""
    result = copy_model(model)
    if not any(_has_branches(node) for node in result.graph.node):
        return result
    # Types and shapes suffice here, so the weights are not loaded.
    known = shape_inference.infer_shapes(result).graph
    lengths = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*known.input, *known.value_info)
    }
    lengths |= {tensor.name: list(tensor.dims) for tensor in known.initializer}
    nodes: list[NodeProto] = []
    for number, node in enumerate(result.graph.node):
        if _has_branches(node):
            unrolled = _Unrolling(node, node.name or f"scan.{number}", lengths)
            nodes.extend(unrolled.run())
            result.graph.initializer.extend(unrolled.initializers)
        else:
            nodes.append(copy_node(node))
    replace_nodes(result.graph, nodes)
    return result


def _has_branches(node: NodeProto) -> bool:
    return node.op_type == "Scan" and any(inner.op_type == "If" for body in subgraphs(node) for inner in body.node)


class _Unrolling:
    def __init__(self, node: NodeProto, name: str, lengths: dict[str, list[int]]) -> None:
        self.node, self.name = node, name
        given = attributes(node)
        self.body: GraphProto = given["body"]
        scanned = given["num_scan_inputs"]
        self.states = len(node.input) - scanned
        self.input_axes = given.get("scan_input_axes", [0] * scanned)
        self.output_axes = given.get("scan_output_axes", [0] * (len(node.output) - self.states))
        directions = (*given.get("scan_input_directions", []), *given.get("scan_output_directions", []))
        shape = lengths.get(node.input[self.states], [])
        axis = self.input_axes[0]
        self.length = shape[axis] if -len(shape) <= axis < len(shape) else 0
        if not self.length or any(directions):
            detail = "it runs backwards" if any(directions) else "its length is unknown"
            problem = f"unsupported Scan at {name}: {detail}"
            raise BundleError("E0662", "build", problem, "export the checkpoint again")
        self.initializers: list[TensorProto] = []

    def run(self) -> list[NodeProto]:
        """The nodes that replace the Scan."""
        nodes: list[NodeProto] = []
        states = list(self.node.input[: self.states])
        steps: list[list[str]] = []
        shared = {tensor.name: f"{self.name}.{tensor.name}" for tensor in self.body.initializer}
        self.initializers += [_named(tensor, shared[tensor.name]) for tensor in self.body.initializer]
        inputs = [value.name for value in self.body.input]
        for step in range(self.length):
            names = shared | dict(zip(inputs[: self.states], states, strict=True))
            prefix = f"{self.name}.{step}."
            index = self._constant(f"{prefix}index", np.array(step, np.int64))
            sources = zip(inputs[self.states :], self.node.input[self.states :], self.input_axes, strict=True)
            for inner, outer, axis in sources:
                names[inner] = prefix + inner
                nodes.append(helper.make_node("Gather", [outer, index], [names[inner]], prefix + inner, axis=axis))
            nodes.extend(_renamed(self.body, names, prefix))
            outputs = [names.get(value.name, value.name) for value in self.body.output]
            states, rest = outputs[: self.states], outputs[self.states :]
            steps.append(rest)
        for state, output in zip(states, self.node.output, strict=False):
            if output:
                nodes.append(helper.make_node("Identity", [state], [output], output))
        for i, (output, axis) in enumerate(zip(self.node.output[self.states :], self.output_axes, strict=True)):
            if output:
                nodes.extend(self._stacked([rest[i] for rest in steps], output, axis))
        return nodes

    def _stacked(self, parts: list[str], output: str, axis: int) -> list[NodeProto]:
        axes = self._constant(f"{output}.axis", np.array([axis], np.int64))
        names = [f"{output}.{i}" for i in range(len(parts))]
        nodes = [helper.make_node("Unsqueeze", [p, axes], [n], n) for p, n in zip(parts, names, strict=True)]
        return [*nodes, helper.make_node("Concat", names, [output], output, axis=axis)]

    def _constant(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _renamed(graph: GraphProto, names: dict[str, str], prefix: str) -> list[NodeProto]:
    """Copies of the graph's nodes under new names; adds their outputs to `names`."""
    nodes = []
    for node in graph.node:
        copy = copy_node(node)
        copy.name = prefix + (copy.name or next(name for name in copy.output if name))
        copy.input[:] = [names.get(name, name) for name in copy.input]
        for name in copy.output:
            if name:
                names[name] = prefix + name
        copy.output[:] = [names[name] if name else name for name in copy.output]
        for inner in subgraphs(copy):
            _rename_graph(inner, names, prefix)
        nodes.append(copy)
    return nodes


def _rename_graph(graph: GraphProto, outer: dict[str, str], prefix: str) -> None:
    """Renames a subgraph in place: its own names, and those it captures from outside."""
    names = dict(outer)
    for entry in (*graph.input, *graph.initializer):
        names[entry.name] = prefix + entry.name
        entry.name = names[entry.name]
    replace_nodes(graph, _renamed(graph, names, prefix))
    for value in graph.output:
        value.name = names.get(value.name, value.name)
    del graph.value_info[:]
