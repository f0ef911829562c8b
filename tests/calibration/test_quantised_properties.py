"""Graphs and recipes drawn at random: what the rewriting may not change, and how far numbers in few bits may be off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from engine_tools import model_of, value
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from titans_calibration.gptq import gptq
from titans_calibration.graphs import quantise_graphs
from titans_calibration.observe import Observed
from titans_calibration.recipe import ActivationsRecipe, Recipe, RecipeError, WeightsRecipe, check_recipe
from titans_calibration.weights import QuantisedMatrix, quantise, round_to, scales_of, stored

WIDTHS = (48, 64, 96)
TABLE = 128
# Of an output's norm, after up to four matmuls in a row. Wrong scales, axes or factors are off by the norm itself.
FAR = {"float16": 0.01, "bfloat16": 0.03, "int8": 0.1, "fp8": 0.2, "int4": 0.45}


@dataclass
class Drawn:
    """A graph of norms, matmuls, biases, branches and a lookup, the same nodes for any number of tokens."""

    draw: np.random.Generator
    flat: bool = False  # without a batch, where matmuls may be Gemm
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flat = bool(self.draw.integers(2))
        self.weights["axis"] = np.zeros(1, np.int64)
        table = self.draw.standard_normal((TABLE, 64)).astype(np.float32)
        self.weights["model.embedding"] = table
        self._add("Gather", ["model.embedding", "ids"], 64)
        for _ in range(int(self.draw.integers(4, 9))):
            self._grow()
        self.outputs = sorted({node.output[0] for node in self.nodes if node.op_type != "Gather"})
        if not any(node.op_type in ("MatMul", "Gemm") for node in self.nodes):
            self.outputs.append(self._matmul(next(iter(self.widths))))

    def _name(self) -> str:
        return f"v{len(self.nodes)}"

    def _add(self, operator: str, inputs: list[str], width: int, **attributes: Any) -> str:
        name = self._name()
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.widths[name] = width
        return name

    def _weight(self, name: str, *shape: int) -> str:
        name = f"model.{name}{len(self.weights)}.weight"
        self.weights[name] = (self.draw.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return name

    def _matmul(self, source: str) -> str:
        rows = self.widths[source]
        used = [n for n in self.nodes if n.op_type == "MatMul" and self.weights[n.input[1]].shape[0] == rows]
        if used and self.draw.random() < 0.3:  # a weight that was used before
            name = used[0].input[1]
            return self._add("MatMul", [source, name], self.weights[name].shape[1])
        columns = 96 if rows == 48 else int(self.draw.choice(WIDTHS[1:]))
        if self.flat and self.draw.random() < 0.5:
            name = self._weight("g", columns, rows)
            return self._add("Gemm", [source, name], columns, transB=1)
        return self._add("MatMul", [source, self._weight("m", rows, columns)], columns)

    def _grow(self) -> None:
        source = str(self.draw.choice(sorted(self.widths)))
        width = self.widths[source]
        kind = self.draw.random()
        if kind < 0.5:
            self._matmul(source)
        elif kind < 0.75:
            gain = self._weight("norm", width)
            self.weights[gain] = np.abs(self.weights[gain]) * np.sqrt(np.float32(width)) + np.float32(0.5)
            self.weights[gain][::16] *= 10
            self._add("Mul", [source, gain], width)
        elif kind < 0.9:
            self._add("Add", [source, self._weight("bias", width)], width)
        else:
            name = self._name()
            self.weights.setdefault("yes", np.array(True))
            parts = [
                helper.make_graph([helper.make_node(operator, [source], [part])], part, [], [value(part, None)])
                for operator, part in (("Neg", f"{name}.then"), ("Identity", f"{name}.else"))
            ]
            self._add("If", ["yes"], width, then_branch=parts[0], else_branch=parts[1])

    def model(self, tokens: int, everything: bool = False) -> onnx.ModelProto:
        lead = (tokens,) if self.flat else (1, tokens)
        known = [value(name, (*lead, width)) for name, width in self.widths.items()]
        given: list[ValueInfoProto] = [helper.make_tensor_value_info("ids", TensorProto.INT64, lead)]
        outputs = [v for v in known if everything or v.name in self.outputs]
        read = {name for node in self.nodes for name in node.input}
        tensors = tuple(numpy_helper.from_array(a, name) for name, a in self.weights.items() if name in read)
        model = model_of(self.nodes, given, outputs, tensors)
        model.graph.value_info.extend([v for v in known if v.name not in {o.name for o in outputs}])
        return model

    def ids(self, tokens: int, seed: int) -> NDArray[np.int64]:
        found = np.random.default_rng(seed).integers(0, TABLE, tokens)
        return found if self.flat else found[None]

    def observed(self) -> dict[str, Observed]:
        """What matmuls see, in float64."""
        model = self.model(200, everything=True)
        names = [v.name for v in model.graph.output]
        values = dict(zip(names, ReferenceEvaluator(model).run(None, {"ids": self.ids(200, 1)}), strict=True))
        found: dict[str, Observed] = {}
        for node in self.nodes:
            if node.op_type in ("MatMul", "Gemm"):
                rows = values[node.input[0]]
                found.setdefault(node.input[1], Observed.empty(rows.shape[-1], gram=True)).add(rows, 0)
        return found


def recipes(draw: np.random.Generator) -> Iterator[Recipe]:
    """Endless, of those that go together."""
    while True:
        format = str(draw.choice(list(FAR)))
        recipe = Recipe(
            "drawn",
            weights=WeightsRecipe(
                format,
                group=int(draw.choice([16, 32])) if draw.random() < 0.5 else None,
                method=str(draw.choice(["minmax", "mse", "awq", "gptq"])),
            ),
            activations=ActivationsRecipe(format, str(draw.choice(["minmax", "mse"]))) if draw.random() < 0.5 else None,
            smooth=float(draw.choice([0.3, 0.5, 0.8])) if draw.random() < 0.5 else None,
            embedding=str(draw.choice(["float32", "float16", "int8"])),
        )
        try:
            check_recipe(recipe, "drawn")
        except RecipeError:
            continue
        yield recipe


def _run(model: onnx.ModelProto, ids: NDArray[np.int64]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"ids": ids}))


@pytest.mark.sample(5)
@pytest.mark.parametrize("seed", range(40))
def test_graphs_stay_near_what_they_were(seed: int) -> None:
    draw = np.random.default_rng(seed)
    drawn, recipe = Drawn(draw), next(recipes(draw))
    models = {"one": drawn.model(1), "seven": drawn.model(7)}
    found = quantise_graphs(models, recipe, drawn.observed())
    for (name, before), tokens in zip(models.items(), (1, 7), strict=True):
        after, ids = found.models[name], drawn.ids(tokens, 2)
        assert [v.SerializeToString() for v in after.graph.output] == [
            v.SerializeToString() for v in before.graph.output
        ]
        right = ReferenceEvaluator(before).run(None, {"ids": ids})
        for outputs in (ReferenceEvaluator(after).run(None, {"ids": ids}), _run(after, ids)):
            for what, got, expected in zip(drawn.outputs, outputs, right, strict=True):
                off = np.linalg.norm(got - expected) / np.linalg.norm(expected)
                assert off < FAR[recipe.weights.format], (recipe, what, name)
    one, seven = ({t.name: t.SerializeToString() for t in model.graph.initializer} for model in found.models.values())
    assert one == seven
    quantised = [name for name, format in found.report.matmuls.items() if format != "float32"]
    assert not set(quantised) & set(one), "float32 is still there"


def _plain_gptq(
    matrix: NDArray[np.float32], gram: NDArray[np.float64], format: str, group: int | None
) -> QuantisedMatrix:
    """Channel by channel, every correction at once."""
    work = matrix.astype(np.float64)
    damped = gram + 0.01 * np.diagonal(gram).mean() * np.eye(len(gram))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    numbers, scales = np.zeros_like(work), []
    for row in range(len(work)):
        if row % (group or len(work)) == 0:
            scales.append(scales_of(np.abs(work[row : row + (group or len(work))]).max(axis=0), format))
        scale = scales[-1].astype(np.float64)
        numbers[row] = round_to(work[row], scale, format)
        error = (work[row] - numbers[row] * scale) / factor[row, row]
        work[row + 1 :] -= np.outer(factor[row, row + 1 :], error)
    return QuantisedMatrix(format, stored(numbers, format), np.stack(scales), group)


@pytest.mark.parametrize(("rows", "group"), [(96, None), (160, 32), (256, 128), (512, 256)])
def test_gptq_in_blocks_is_gptq(rows: int, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups within a block of corrections, across its end and wider than one; columns in two parts."""
    monkeypatch.setattr("titans_calibration.gptq.COLUMNS", 4)
    draw = np.random.default_rng(rows)
    inputs = draw.standard_normal((2 * rows, rows)) @ (np.eye(rows) + 0.1 * draw.standard_normal((rows, rows)))
    matrix, gram = draw.standard_normal((rows, 6)).astype(np.float32), inputs.T @ inputs
    found, plain = gptq(matrix, gram, "int4", group), _plain_gptq(matrix, gram, "int4", group)
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-5)
    assert (found.values == plain.values).mean() > 0.99  # numbers in the middle may round either way


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_no_number_is_lost(format: str) -> None:
    """Columns of the smallest, subnormal, largest and equal numbers, at heights of no round number."""
    for rows, scale in itertools.product((1, 31, 33), (1e-45, 1e-38, 1e-30, 1.0, 3e38)):
        draw = np.random.default_rng(rows)
        matrix = np.clip(draw.standard_normal((rows, 5)) / 3, -1, 1)
        matrix[:, 1], matrix[:, 2], matrix[0, 3] = 1, 0, -1
        matrix = (matrix * scale).astype(np.float32)
        for method in ("minmax", "mse"):
            found = quantise(matrix, format, None, method)
            numbers = found.dequantised()
            assert np.isfinite(numbers).all() and np.isfinite(found.scales).all() and (found.scales > 0).all()
            assert not numbers[:, 2].any()
            steps = {"int8": 254, "int4": 14, "fp8": 28}[format]
            if scale > 1e-35 and method == "minmax":  # below, a scale would be subnormal
                largest = np.abs(matrix).max(0)
                assert (np.abs(numbers.astype(np.float64) - matrix) <= largest / steps * 1.0001).all()
