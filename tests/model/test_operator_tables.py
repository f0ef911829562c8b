"""The tables of the operators: against the pages that define them, and what follows from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from titans_export.errors import UsageError
from titans_export.onnx.functions import build_function
from titans_export.onnx.hyper_connection import build_hyper_connection_function
from titans_export.operators import (
    CHUNK_NEURAL_MEMORY,
    DOMAIN,
    HYPER_CONNECTION,
    MEMORY_OPERATORS,
    NEURAL_MEMORY,
    OPERATORS,
    Operator,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {
    "NeuralMemory": "operator.md",
    "ChunkNeuralMemory": "chunk-operator.md",
    "CachedAttention": "attention-operator.md",
    "CausalConvolution": "convolution-operator.md",
    "HyperConnection": "hyper-connection.md",
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
operators = pytest.mark.parametrize("operator", MEMORY_OPERATORS.values(), ids=MEMORY_OPERATORS)
NETWORK: dict[str, Any] = {
    "schedule": "any",
    "widths": [6, 6],
    "activation": "silu",
    "residual": 0,
    "layer_norm": 0,
    "chunk_size": 4,
}
NODES = {"NeuralMemory": {"mode": "update", **NETWORK}, "ChunkNeuralMemory": NETWORK}


def _section(operator: Operator, title: str) -> list[list[str]]:
    """The cells of the table's rows in a section of the operator's page."""
    page = (DOCS / PAGES[operator.name]).read_text(encoding="utf-8")
    section = re.split(r"^## ", page.split(f"\n## {title}\n")[1], flags=re.M)[0]
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@every_operator
def test_the_page_lists_the_inputs_and_their_types_in_order(operator: Operator) -> None:
    rows = _section(operator, "Inputs")
    assert [name for row in rows for name in _names(row[1])] == list(operator.input_names)
    for row in rows:
        places = [int(place) for place in row[0].split(",")]
        for place, name in zip(places, _names(row[1]), strict=True):
            assert operator.input_names[place] == name
            assert row[2].split()[0] == operator.dtype(name)
            assert ("optional" in row[2]) == (name in operator.optional(operator.input_names))


@every_operator
def test_the_page_lists_the_outputs_in_order(operator: Operator) -> None:
    rows = _section(operator, "Outputs")
    assert [(int(row[0]), *_names(row[1])) for row in rows] == list(enumerate(operator.outputs))


@every_operator
def test_the_page_lists_the_attributes_with_their_defaults(operator: Operator) -> None:
    rows = _section(operator, "Attributes")
    assert [name for row in rows for name in _names(row[0])] == [entry.name for entry in operator.attributes]
    for row in rows:
        for name in _names(row[0]):
            default = operator.defaults.get(name)
            if name not in operator.defaults or default is None:
                assert "default" not in row[2]
            elif isinstance(default, str):
                assert f'"{default}" (default)' in row[2]
            else:
                assert re.search(rf"\b{default:g} \(default\)|default {default:g}\b", row[2]), row


@operators
def test_attributes_are_completed_and_odd_ones_refused(operator: Operator) -> None:
    node = NODES[operator.name]
    full = operator.complete(node)
    assert list(full) == [entry.name for entry in operator.attributes]
    assert operator.given(full) == node
    assert operator.complete(full) == full
    for name, code in (("gates", "E0701"), ("mode" if operator is CHUNK_NEURAL_MEMORY else "batch_size", "E0701")):
        with pytest.raises(UsageError, match=rf"\[{operator.name}\] invalid attribute {name}: .*\(TITANS-{code}\)"):
            operator.complete(node | {name: "chunk"})
    with pytest.raises(UsageError, match=rf"\[{operator.name}\] missing attribute: widths\. .*\(TITANS-E0703\)"):
        operator.complete({name: value for name, value in node.items() if name != "widths"})


def test_a_connection_s_attributes_follow_from_its_table() -> None:
    shapes = {"residuals": (1, 2, 2, 8), "projection": (8, 4), "bias": (2, 4)}

    def body(**values: Any) -> Any:
        node = helper.make_node(HYPER_CONNECTION.name, list(shapes), list(HYPER_CONNECTION.outputs), **values)
        return build_hyper_connection_function(shapes, node)

    assert HYPER_CONNECTION.complete({}) == {"iterations": 20}
    found = body(iterations=1)
    assert (found.overload, list(found.attribute)) == ("b1_t2_s2_d8_i1_beta", ["iterations"])
    with pytest.raises(UsageError, match=r"\[HyperConnection\] invalid attribute epsilon: .*\(TITANS-E0701\)"):
        body(epsilon=1e-6)


@operators
def test_operands_end_with_the_last_one_present(operator: Operator) -> None:
    assert operator.operands({"state", "q"}) == ["state", "q"]
    assert operator.operands({"norm_scale", "q", "state"}) == ["state", "q", *[""] * 10, "norm_scale"]
    assert operator.operands(operator.input_names) == list(operator.input_names)


def test_overloads_name_what_differs_from_the_defaults() -> None:
    node = NODES["NeuralMemory"] | {"widths": (32, 64, 32), "residual": 1}
    sizes = {"b": 1, "h": 4, "t": 64}
    assert NEURAL_MEMORY.overload(node, sizes, ["learn"]) == "update_any_b1_h4_t64_w32x64x32_silu_residual_c4_learn"
    assert NEURAL_MEMORY.overload(node | {"mode": "read"}, sizes, []) == "read_b1_h4_t64_w32x64x32_silu_residual_c4"
    chunk = NETWORK | {"batch_size": 8, "loss_scale": 0.25, "lookahead": 1, "orthogonalise": 0, "grad_clamp": 0.5}
    name = CHUNK_NEURAL_MEMORY.overload(chunk, sizes, ["initial_weights"])
    assert name == "any_b1_h4_t64_w6x6_silu_c4_g8_l0.25_lookahead_clamp0.5_initial_weights"


@pytest.mark.parametrize(
    ("changes", "extra", "word"),
    [
        ({}, "valid", "valid"),
        ({"widths": [6, 10, 9, 6]}, None, "widths"),
        ({"layer_norm": 1}, None, "norm_weight"),
    ],
)
def test_chunk_nodes_without_a_reference_get_no_body(changes: dict[str, Any], extra: str | None, word: str) -> None:
    present = ["state", "q", "k", "v", "step_size", "momentum", "forget_gate", "fill", *([extra] if extra else [])]
    node = helper.make_node(
        CHUNK_NEURAL_MEMORY.name,
        CHUNK_NEURAL_MEMORY.operands(present),
        list(CHUNK_NEURAL_MEMORY.outputs[:3]),
        domain=DOMAIN,
        **(NETWORK | changes),
    )
    with pytest.raises(UsageError, match=rf"no function body for a node with this {word}\b.*TITANS-E0720"):
        build_function({name: (1, 2, 3) for name in present}, node)
