"""Prepares a bundle's graphs for compilers: inlined, or with the memory as a plugin node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import TensorProto, helper, inliner

from ..errors import BundleError
from ..manifest import StateTensor
from ..onnx.nodes import ONNX_DOMAINS, all_nodes, ancestors, attribute, copy_model, inner_nodes, makers_of
from ..operators import DOMAIN, NEURAL_MEMORY, VERSION
from ..operators.neural_memory import MODES

PLUGIN = {"name": NEURAL_MEMORY.name, "namespace": DOMAIN, "version": str(VERSION)}
DECLARED, UNDECLARED, TWO_BUFFERS = "declared", "undeclared", "two-buffers"
ALIASES = (DECLARED, UNDECLARED, TWO_BUFFERS)


def has_kernel(node: onnx.NodeProto) -> bool:
    """Whether one of our GPU kernels computes the node. Other memory nodes become standard operators on a GPU."""
    return bool(node.domain == DOMAIN and node.op_type == NEURAL_MEMORY.name)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with standard ONNX operators only. Raises BundleError for any other operator."""
    inlined = inliner.inline_local_functions(model)
    kept = [entry for entry in inlined.opset_import if entry.domain in ONNX_DOMAINS]
    for node in all_nodes(inlined.graph):
        # Parsers take a foreign node for a plugin, and TensorRT-RTX then ends the process.
        if node.domain not in ONNX_DOMAINS or not onnx.defs.has(node.op_type):
            raise BundleError(
                "E0662",
                "build",
                f"unsupported operator {node.domain or 'ai.onnx'}::{node.op_type} (node {node.name!r})",
                "export the checkpoint again",
            )
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


def in_place(models: Iterable[onnx.ModelProto], state: Sequence[StateTensor]) -> list[str]:
    """Names of the state tensors whose input and output may share one buffer in every graph, for the memory's
    plugin.
    """
    names = [entry.name for entry in state]
    for model in models:
        names = [entry.name for entry in state if entry.name in names and _may_share(model.graph, entry)]
    return names


def _may_share(graph: onnx.GraphProto, entry: StateTensor) -> bool:
    """Whether only memory nodes lead from the old state to the new one, and every other reader runs before the
    overwrite.

    Other readers run before it if they are memory nodes and the update depends on their outputs.
    """
    chain = _chain(graph, entry.output)
    if not chain or chain[0].input[0] != entry.input:
        return False
    captured = {name for node in graph.node for inner in inner_nodes(node) for name in inner.input}
    given = {value.name for value in graph.output}
    for update in chain:
        rows = update.input[0]
        others = [node for node in graph.node if rows in node.input and node.output[0] != update.output[0]]
        before = ancestors(graph, update)
        if rows in captured or rows in given or list(update.input).count(rows) != 1:
            return False
        if not all(has_kernel(node) and node.output[0] in before for node in others):
            return False
    return True


def _chain(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """The chain of memory updates that leads to a value, in order."""
    makers = makers_of(graph)
    found: list[onnx.NodeProto] = []
    while (node := makers.get(output)) is not None and has_kernel(node) and attribute(node, "mode") == "update":
        if node.output[1] != output:
            return []
        found.insert(0, node)
        output = node.input[0]
    return found


def with_kernels(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that keeps memory nodes with a GPU kernel, and their functions. Other functions become standard
    operators.
    """
    result = copy_model(model)
    covered = {node.overload for node in all_nodes(model.graph) if has_kernel(node)}
    kept: list[onnx.FunctionProto] = []
    others: list[onnx.FunctionProto] = []
    for function in model.functions:
        memory = (function.domain, function.name) == (DOMAIN, NEURAL_MEMORY.name) and function.overload in covered
        (kept if memory else others).append(function)
    if others:
        # The inliner keeps nodes whose function is missing.
        del result.functions[:]
        result.functions.extend(others)
        result = inliner.inline_local_functions(result)
        del result.functions[:]
        result.functions.extend(kept)
    return result


def with_plugin(model: onnx.ModelProto, alias: str, shared: Sequence[str]) -> onnx.ModelProto:
    """The graph for full TensorRT: memory nodes in the form of its plugin, and no functions.

    shared: the state inputs that use one buffer; nodes of other states use two.
    """
    result = with_kernels(model)
    # A function of the same name would take precedence over the plugin.
    del result.functions[:]
    used = {name for node in all_nodes(result.graph) for name in node.input} | {v.name for v in result.graph.output}
    updates = [node for node in result.graph.node if has_kernel(node) and attribute(node, "mode") == "update"]
    roots = {node.output[0]: _chain(result.graph, node.output[1])[0].input[0] for node in updates}
    whole_numbers: dict[str, str] = {}  # for bool inputs, which TensorRT does not pass to plugins
    for node in result.graph.node:
        if not has_kernel(node):
            continue
        mode = attribute(node, "mode")
        given = [name for name, value in zip(NEURAL_MEMORY.input_names, node.input, strict=False) if value]
        outputs = [name for name, value in zip(MODES[mode], node.output, strict=False) if value in used]
        if outputs != list(MODES[mode][: len(outputs)]):  # an unused output between used ones stays
            outputs = list(MODES[mode][: 1 + max(MODES[mode].index(name) for name in outputs)])
        own = alias if roots.get(node.output[0]) in shared else TWO_BUFFERS
        present = [value for value in node.input if value]
        if "learn" in given:
            at = given.index("learn")
            present[at] = whole_numbers.setdefault(present[at], f"{present[at]}.int64")
        node.ClearField("overload")
        del node.input[:], node.output[len(outputs) :]
        node.input.extend(present)
        added: dict[str, str | int] = {
            "plugin_namespace": PLUGIN["namespace"],
            "plugin_version": PLUGIN["version"],
            "alias": own,
            "inputs": ",".join(given),
            "outputs": ",".join(outputs),
        }
        seed = attribute(node, "seed") or 0
        for name, value in NEURAL_MEMORY.defaults.items():
            if attribute(node, name) is None:
                added[name] = value
        for entry in node.attribute:
            if entry.name == "seed" and seed >= 2**31:
                entry.i = seed - 2**32  # the plugin's field holds the 32 bits as int32
        node.attribute.extend(helper.make_attribute(name, value) for name, value in added.items())
    for name, converted in whole_numbers.items():
        makers = [index for index, node in enumerate(result.graph.node) if name in node.output]
        cast = helper.make_node("Cast", [name], [converted], name=converted, to=TensorProto.INT64)
        result.graph.node.insert(makers[0] + 1 if makers else 0, cast)
    return result
