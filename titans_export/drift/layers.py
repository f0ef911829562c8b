"""Where in a model two bundles part: the relative error of every layer's activations over the beginning of a stream.

The graphs run in ONNX Runtime with more outputs. What is compared is found by what the graphs are made of, not by the
names of their values, so that rewritten graphs are understood too: of layer i the residual stream after its last
product, the last one with a weight of `model.layers.i`, and what each memory retrieves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from ..bundle import Bundle, read_bundle
from ..engines.onnxruntime import kernel_library
from ..errors import MachineError
from ..manifest import GraphEntry
from ..onnx.files import load_structure
from ..onnx.nodes import attribute, is_memory
from ..running import BundleRunner, Call, memory_kernel, open_session

if TYPE_CHECKING:
    from .streams import Inputs

Arrays = dict[str, NDArray[Any]]
_PRODUCTS = frozenset(("MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul", "QGemm"))
# Where a layer's outcome joins what passes it by: of a HyperConnection that is its second output.
_JOINS = {"Add": 0, "HyperConnection": 1}
# Not tables that layers share, such as those of rotary embeddings.
_LAYER = re.compile(r"model\.layers\.(\d+)\..*weight")
_FARTHEST_JOIN = 16  # nodes from a layer's last matmul
_WITHOUT_LAYERS = "leave the layers out with --layers 0"


@dataclass(frozen=True)
class LayerError:
    """Relative error of a layer's activations against the reference: root mean square over all positions."""

    layer: str  # such as layers.0, or layers.0.memory for what a memory retrieves
    what: str
    relative_error: float
    relative_error_last: float  # of the last tenth of the positions


class _Probed:
    """A bundle's graphs with the activations of each layer among their outputs."""

    def __init__(self, bundle: Bundle) -> None:
        self._probes: dict[str, dict[str, list[str]]] = {}  # by graph: layers to the values that hold their activations
        self._models: dict[str, ModelProto] = {}
        for graph in bundle.manifest.graphs:
            self._models[graph.name] = load_structure(bundle.path / graph.file)
            self._probes[graph.name] = activations(self._models[graph.name])
        shown = {
            graph: [value for names in probes.values() for value in names] for graph, probes in self._probes.items()
        }
        self.runner = BundleRunner(bundle, self._open, shown)
        self._shown = shown

    def activations(self, call: Call) -> Arrays:
        """By layer, (T, ...) each. Tokens are the last dimension but one: retrievals are (B, heads, T, size)."""
        probes = self._probes[call.graph.name]
        return {layer: np.concatenate([call.values[name] for name in names], -2) for layer, names in probes.items()}

    def _open(self, graph: GraphEntry) -> onnxruntime.InferenceSession:
        model = self._models[graph.name]
        given = {value.name for value in model.graph.output}
        model.graph.output.extend(
            helper.make_empty_tensor_value_info(name)
            for name in dict.fromkeys(self._shown[graph.name])
            if name not in given
        )
        kernel = memory_kernel()
        if kernel is None and not model.functions:
            kernel = kernel_library()  # raises: the memory has no function body either
        try:
            return open_session(model, kernel=kernel, folder=self.runner.bundle.path)
        except Exception as error:  # ONNX Runtime raises nothing narrower
            problem = f"ONNX Runtime cannot open the graphs: {' '.join(str(error).split())[:200]}"
            raise MachineError("E0650", "drift", problem, _WITHOUT_LAYERS) from None


def measure_layers(base: Path, others: Mapping[str, Path], inputs: Inputs) -> dict[str, list[LayerError]]:
    """The layers' errors of each candidate over all inputs, fed to one stream each in the same cuts."""
    reference, probed = _Probed(read_bundle(base)), {name: _Probed(read_bundle(path)) for name, path in others.items()}
    states = {name: one.runner.bundle.initial_state() for name, one in probed.items()}
    sums: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in others}
    late_from = len(inputs) - max(1, len(inputs) // 10)
    for call in reference.runner.stream(inputs):
        wanted, tokens = reference.activations(call), call.graph.tokens
        block = inputs[call.position : call.position + tokens]
        for name, one in probed.items():
            same = one.runner.next(call.position, tokens)
            if same.tokens != tokens:
                raise MachineError("E0906", "drift", f"{name} has no graph of {tokens} tokens", _WITHOUT_LAYERS)
            answer = one.runner.run(same, block, call.position, states[name])
            states[name] = answer.state
            got = one.activations(answer)
            for layer in wanted.keys() & got.keys():
                rows = wanted[layer].shape[-2]  # may be more or fewer than tokens
                late = slice(min(rows, -(-max(0, late_from - call.position) * rows // tokens)), None)
                total = sums[name].setdefault(layer, np.zeros((2, 2)))
                for row, part in zip(total, (slice(None), late), strict=True):
                    row += _squares(got[layer][..., part, :], wanted[layer][..., part, :])
    return {name: [_error(layer, sums[name][layer]) for layer in sorted(sums[name], key=_order)] for name in others}


def activations(model: ModelProto) -> dict[str, list[str]]:
    """Layers, such as layers.0 and layers.0.memory, to the values that hold their activations, token by token."""
    graph = model.graph
    owners = _owners(graph)
    constant = set(owners)
    last: dict[int, int] = {}
    for number, node in enumerate(graph.node):
        layers = {owner for name in node.input for owner in owners.get(name, ())}
        if node.op_type in _PRODUCTS and any(name and name not in constant for name in node.input):
            last |= dict.fromkeys(layers, number)
    found = {f"layers.{layer}": [_join(graph, constant, number)] for layer, number in last.items()}
    # A memory may be advanced by several nodes, each over some of the tokens: the state goes from one to the next.
    # What a read alone retrieves, as MAC's before attention, is left out.
    memories = {value.name: value.name for value in graph.input}
    for node in graph.node:
        if is_memory(node) and node.input[0] in memories and attribute(node, "mode") != "read":
            name = memories[node.input[0]]
            memories[node.output[1]] = name
            found.setdefault(name, []).append(node.output[0])
    return found


def _owners(graph: Any) -> dict[str, set[int]]:
    """Values that are made of initialisers alone, each with the layers whose weights are in it."""
    owners: dict[str, set[int]] = {}
    for tensor in graph.initializer:
        match = _LAYER.match(tensor.name)
        owners[tensor.name] = {int(match[1])} if match else set()
    for node in graph.node:
        given = [name for name in node.input if name]
        if all(name in owners for name in given):
            owners |= {name: set().union(*(owners[value] for value in given)) for name in node.output}
    return owners


def _join(graph: Any, constant: set[str], number: int) -> str:
    """The residual stream after the product of that number; its own output where nothing joins."""
    product: NodeProto = graph.node[number]
    value: str = product.output[0]
    for _ in range(_FARTHEST_JOIN):
        node = next((n for n in list(graph.node)[number + 1 :] if value in n.input), None)
        if node is None:
            break
        if node.op_type in _JOINS and sum(name not in constant for name in node.input if name) > 1:
            return str(node.output[_JOINS[node.op_type]])
        value = node.output[0]
    return str(product.output[0])


def _squares(got: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """Sums of squares: of the difference, and of the reference."""
    a, b = got.astype(np.float64), right.astype(np.float64)
    return np.array([np.square(a - b).sum(), np.square(b).sum()])


def _error(layer: str, squares: NDArray[np.float64]) -> LayerError:
    with np.errstate(invalid="ignore", divide="ignore"):
        whole, late = (float(value) for value in np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], 1e-300)))
    return LayerError(layer, "retrievals" if not layer.rpartition(".")[2].isdigit() else "activations", whole, late)


def _order(layer: str) -> tuple[int, bool, str]:
    match = re.match(r"layers\.(\d+)", layer)
    # A layer's memory works before its last product.
    return (int(match[1]) if match else 1 << 30, layer.rpartition(".")[2].isdigit(), layer)
