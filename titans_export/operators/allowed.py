"""The operators that this project writes into graphs. Readers refuse any other.

ONNX Runtime has operators that trust their inputs, so a foreign graph could read and write memory outside of its
tensors. The runtime has the same lists in graph_check.cpp; a test compares them. SECURITY.md says what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from . import OPERATORS
from .table import DOMAIN, VERSION

if TYPE_CHECKING:
    from onnx import ModelProto

FIRST_OPSET, LAST_OPSET = 18, 21
FUSED_DOMAIN = "com.microsoft"
UNVERSIONED = 1000  # what ONNX Runtime writes for our operators
STANDARD = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "CumSum",
        "DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gather", "GatherElements", "GatherND",
        "Gelu", "Gemm", "Greater", "GreaterOrEqual", "Identity", "If", "IsInf", "IsNaN", "LayerNormalization",
        "LeakyRelu", "Less", "LessOrEqual", "Log", "Loop", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
        "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin",
        "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "Scan", "ScatterElements", "ScatterND", "Shape",
        "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile",
        "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip
# In engines for ONNX Runtime: what its rewrites put in place of standard operators.
FUSED_STANDARD = frozenset(("DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "SimplifiedLayerNormalization"))
FUSED = frozenset(
    {
        "BiasGelu", "DequantizeLinear", "DynamicQuantizeMatMul", "FastGelu", "FusedGemm", "FusedMatMul", "Gelu",
        "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearAdd", "QLinearConcat", "QLinearMul",
        "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear", "QuickGelu",
        "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip


def check_operators(model: ModelProto, name: str, compiled: bool = False) -> None:
    """Raises BundleError unless the graph has only operators that this project writes, in subgraphs and functions too.

    name: of the file, for the message. compiled: whether it is an engine's graph, in which ONNX Runtime has fused
    operators.
    """
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            if not _is_known_opset(entry.domain, entry.version, compiled):
                raise _unknown(name, "operator set", entry.domain, str(entry.version))
    for function in model.functions:
        if function.domain != DOMAIN or function.name not in OPERATORS:
            raise _unknown(name, "function", function.domain, function.name)
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        for node in waiting.pop().node:
            if not _is_known(node.domain, node.op_type, compiled):
                raise _unknown(name, "operator", node.domain, node.op_type)
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def _is_known_opset(domain: str, version: int, compiled: bool) -> bool:
    if domain == "":
        return FIRST_OPSET <= version <= LAST_OPSET
    if domain == DOMAIN:
        return version == VERSION or (compiled and version == UNVERSIONED)
    return compiled and domain == FUSED_DOMAIN and version == 1


def _is_known(domain: str, operator: str, compiled: bool) -> bool:
    if domain == "":
        return operator in STANDARD or (compiled and operator in FUSED_STANDARD)
    if domain == DOMAIN:
        return operator in OPERATORS
    return compiled and domain == FUSED_DOMAIN and operator in FUSED


def _unknown(name: str, what: str, domain: str, operator: str) -> BundleError:
    problem = f'unknown {what}: titans-export does not write {domain or "ai.onnx"} "{operator}"'
    fix = "do not trust the source of this bundle, or give --allow-any-operator for your own"
    return BundleError("E0210", name, problem, fix)
