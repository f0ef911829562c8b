"""Function bodies of both memory operators in ONNX Runtime, without our kernels, against the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from tolerances import TOLERANCES

from titans_export.model import chunk_neural_memory, neural_memory
from titans_export.model.chunk_update import ChunkMemorySpec, initial_chunk_rows
from titans_export.model.fast_networks import NetworkSpec
from titans_export.model.memory import MemorySpec
from titans_export.onnx.functions import build_function
from titans_export.onnx.tracing import IR_VERSION, OPSET
from titans_export.operators import CHUNK_NEURAL_MEMORY, DOMAIN, MEMORY_OPERATORS, NEURAL_MEMORY, VERSION, Operator
from titans_export.operators.neural_memory import MODES

HEADS, TOKENS, WIDTH, CHUNK = 2, 3, 4, 2
TOKEN_SPEC = MemorySpec((WIDTH, 6, WIDTH), chunk_size=CHUNK)
CHUNK_SPEC = ChunkMemorySpec(NetworkSpec("mlp", WIDTH, 2, 6), CHUNK, 2 * CHUNK, 1 / WIDTH)
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def _weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, *shape) * 0.5 for shape in shapes]


def _case(operator: Operator, mode: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[str, ...]]:
    """Attributes, inputs and outputs of a node."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, HEADS, TOKENS, WIDTH) for name in ("q", "k", "v")}
    inputs |= {name: 0.3 * torch.rand(1, HEADS, TOKENS) for name in ("step_size", "momentum", "forget_gate")}
    inputs |= {"fill": torch.tensor([1]), "learn": torch.tensor([True])}
    if operator is NEURAL_MEMORY:
        inputs["state"] = neural_memory.initial_rows(TOKEN_SPEC, _weights(*TOKEN_SPEC.shapes))
        if mode == "read":
            inputs = {name: inputs[name] for name in ("state", "q")}
        return neural_memory.attributes(TOKEN_SPEC, mode, False), inputs, MODES[mode]
    weights = _weights(*(tuple(shape) for shape in CHUNK_SPEC.network.shapes.values()))
    inputs["state"] = initial_chunk_rows(CHUNK_SPEC, weights)
    inputs["modulation"] = torch.rand(1, HEADS, TOKENS, len(weights))
    return chunk_neural_memory.attributes(CHUNK_SPEC, False), inputs, operator.outputs


def _model(
    operator: Operator, values: dict[str, Any], inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Size]
) -> Any:
    node = helper.make_node(operator.name, operator.operands(inputs), list(outputs), domain=DOMAIN, **values)
    body = build_function({name: tuple(value.shape) for name, value in inputs.items()}, node)
    node.overload = body.overload
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, TYPES[operator.dtype(n)], x.shape) for n, x in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize(
    ("name", "mode"), [("NeuralMemory", "update"), ("NeuralMemory", "read"), ("ChunkNeuralMemory", "")]
)
def test_a_body_computes_the_reference(name: str, mode: str) -> None:
    operator = MEMORY_OPERATORS[name]
    references = {NEURAL_MEMORY: neural_memory.reference, CHUNK_NEURAL_MEMORY: chunk_neural_memory.reference}
    values, inputs, outputs = _case(operator, mode)
    expected = references[operator](operator.complete(values), inputs)(**inputs)
    shapes = {output: value.shape for output, value in zip(outputs, expected, strict=True)}
    model = _model(operator, values, inputs, shapes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert len(found) == len(expected) == len(outputs)
    for value, right, output in zip(found, expected, outputs, strict=True):
        assert value.shape == right.shape, output
        np.testing.assert_allclose(value, right.numpy(), atol=TOLERANCES["cpu", "float32"], err_msg=output)
    if mode != "read":
        assert found[2][..., 2].min() > 0, "no chunk was completed"
