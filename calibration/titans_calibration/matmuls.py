"""Matmuls with a weight in a bundle's graphs: MatMul and Gemm whose second input is an initialiser.

A matmul is a weight with all nodes that multiply by it, in all graphs, so that it gets the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from titans_calibration.weights import QuantisedMatrix
from titans_export.errors import TitansError
from titans_export.onnx.initializers import initializers_of
from titans_export.onnx.mapped import array_of, same_reference
from titans_export.onnx.nodes import ONNX_DOMAINS, attribute, names_read, subgraphs

FLOAT32 = "float32"


class QuantiseError(TitansError):
    """Graphs that cannot be rewritten, or missing observations."""


@dataclass(frozen=True)
class Use:
    """One node of a matmul."""

    graph: str
    index: int  # of the node
    input: str
    transposed: bool  # Gemm's weights may be (N, K)


@dataclass
class Matmul:
    """A weight (K, N) and the nodes that multiply by it."""

    name: str
    matrix: NDArray[np.float32]
    uses: list[Use]
    format: str = FLOAT32
    group: int | None = None
    why: str = ""  # reason to stay float32
    leader: str = ""  # first matmul with the same input
    factors: NDArray[np.float32] | None = None  # the input is divided by these
    input_scale: np.float32 | None = None
    quantised: QuantisedMatrix | None = None

    @property
    def transposed(self) -> bool:
        return self.uses[0].transposed


def matmul_weights(models: Mapping[str, ModelProto]) -> dict[str, tuple[int, int]]:
    """K and N of each matmul's weight, without weights that have another use."""
    return {name: (len(p.matrix), p.matrix.shape[1]) for name, p in find_matmuls(models).items() if not p.why}


def find_matmuls(models: Mapping[str, ModelProto]) -> dict[str, Matmul]:
    """All matmuls by the names of their weights. `why` is set for a use that keeps a weight in float32.

    Raises QuantiseError if a weight differs between graphs.
    """
    matmuls: dict[str, Matmul] = {}
    first: dict[str, TensorProto] = {}
    for graph, model in models.items():
        weights = initializers_of(model.graph)
        for index, node in enumerate(model.graph.node):
            if not is_matmul(node) or node.input[1] not in weights:
                continue
            tensor = weights[node.input[1]]
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
                continue
            transposed = bool(attribute(node, "transB", 0))
            if tensor.name not in matmuls:
                matrix = array_of(tensor)
                first[tensor.name] = tensor
                matmuls[tensor.name] = Matmul(tensor.name, matrix.T if transposed else matrix, [])
            matmul = matmuls[tensor.name]
            matmul.uses.append(Use(graph, index, node.input[0], transposed))
            if matmul.transposed != transposed or node.input[0] in weights:
                matmul.why = "it is read by more than matmuls"
            elif node.op_type == "Gemm" and not _is_plain(node):
                matmul.why = "a Gemm that also scales or transposes its input"
    for model in models.values():
        others = other_uses(model.graph)
        for tensor in model.graph.initializer:
            known = matmuls.get(tensor.name)
            if known is None:
                continue
            if tensor.name in others:
                known.why = "it is read by more than matmuls"
            if tensor is first[tensor.name] or same_reference(tensor, first[tensor.name]):
                continue
            matrix = array_of(tensor)
            if not np.array_equal(matrix.T if known.transposed else matrix, known.matrix, equal_nan=True):
                raise QuantiseError(
                    "E0809", "quantize", f"{tensor.name} differs between graphs", "export the checkpoint again"
                )
    return matmuls


def is_matmul(node: NodeProto) -> bool:
    """Whether the node multiplies by its second input."""
    return node.domain in ONNX_DOMAINS and node.op_type in ("MatMul", "Gemm") and len(node.input) >= 2


def is_lookup(node: NodeProto) -> bool:
    """Whether the node takes whole rows of its first input."""
    return node.domain in ONNX_DOMAINS and node.op_type == "Gather" and attribute(node, "axis", 0) == 0


def _is_plain(node: NodeProto) -> bool:
    return not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0


def other_uses(graph: GraphProto) -> set[str]:
    """The values with a reader other than a matmul's second input, branches and outputs included."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(name for i, name in enumerate(node.input) if not (i == 1 and is_matmul(node)))
        for inner in subgraphs(node):
            found |= names_read(inner)
    return found
