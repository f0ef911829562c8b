"""Matrices in few bits against PyTorch and exhaustive search, and rewritten graphs against quantisation in PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from engine_tools import model_of, value
from manifests import state_tensor
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from quantised_tools import RECIPES, observe_noise

from titans_calibration.awq import awq_scales
from titans_calibration.gptq import gptq
from titans_calibration.graphs import Quantised, quantise_graphs
from titans_calibration.matmuls import QuantiseError
from titans_calibration.memories import store_memories
from titans_calibration.observe import Observed
from titans_calibration.options import QuantizeOptions
from titans_calibration.recipe import ActivationsRecipe, MemoryRecipe, Recipe, WeightsRecipe
from titans_calibration.smooth import smoothing
from titans_calibration.source import open_source
from titans_calibration.weights import CLIPPED, LARGEST, from_fp8, pack_int4, quantise, to_fp8, unpack_int4
from titans_calibration.writing import tolerance_of, write_quantised
from titans_export.bundle import read_bundle
from titans_export.errors import UsageError
from titans_export.graph_check import check_graphs

pytest_plugins = ["quantised_fixtures"]
Floats = NDArray[np.float32]


def matrix(rows: int = 128, columns: int = 48, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def e4m3_numbers() -> NDArray[np.float64]:
    """All finite numbers of the format by its definition: 4 bits of exponent with bias 7, 3 of mantissa, by code."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    sizes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    sizes = np.where((codes & 127) == 127, np.nan, sizes)
    return np.where(codes & 128, -sizes, sizes)


def test_fp8_is_the_nearest_number_of_the_format() -> None:
    numbers = e4m3_numbers()
    finite = numbers[np.isfinite(numbers)]
    values = np.concatenate([finite, matrix().reshape(-1) * 40, [1e-3, 447.9, -448.0]]).astype(np.float32)
    found = from_fp8(to_fp8(values))
    distances = np.abs(values[:, None].astype(np.float64) - finite)
    np.testing.assert_array_equal(np.abs(found.astype(np.float64) - values), distances.min(axis=1))


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("group", [None, 32])
def test_integers_are_those_of_pytorch(format: str, bits: int, group: int | None) -> None:
    weights = matrix()
    found = quantise(weights, format, group, "minmax")
    parts = torch.from_numpy(weights).reshape(-1, group or len(weights), weights.shape[1])
    scales = parts.abs().amax(1) / LARGEST[format]
    most = 2 ** (bits - 1)
    rounded = [
        torch.fake_quantize_per_channel_affine(part, scale, torch.zeros(len(scale)), 1, -most, most - 1)
        for part, scale in zip(parts, scales, strict=True)
    ]
    np.testing.assert_allclose(found.dequantised(), torch.cat(rounded).numpy(), rtol=1e-6, atol=1e-7)
    assert found.scales.shape == (len(weights) // group if group else 1, weights.shape[1])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_least_squared_error_is_that_of_all_clippings(format: str) -> None:
    weights = matrix(64, 12) ** 3  # long tails, where clipping pays
    errors = []
    for fraction in CLIPPED:
        scale = np.abs(weights).max(0) * np.float32(fraction) / np.float32(LARGEST[format])
        steps = weights / scale
        limits = (-8, 7) if format == "int4" else (-LARGEST[format], LARGEST[format])
        clipped = np.clip(steps, *limits)
        numbers = from_fp8(to_fp8(clipped)) if format == "fp8" else np.rint(clipped)
        errors.append(((numbers * scale - weights).astype(np.float64) ** 2).sum(0))
    found = quantise(weights, format, None, "mse").dequantised() - weights
    np.testing.assert_allclose((found.astype(np.float64) ** 2).sum(0), np.min(errors, axis=0), rtol=1e-4)
    plain = quantise(weights, format, None, "minmax").dequantised() - weights
    assert (found**2).sum() <= (plain**2).sum()


def test_zeros_stay_zeros() -> None:
    weights = matrix(32, 4)
    weights[:, 1] = 0
    for format in LARGEST:
        found = quantise(weights, format, 16, "minmax")
        assert not found.dequantised()[:, 1].any()
        assert np.isfinite(found.dequantised()).all()


@pytest.mark.parametrize("count", [6, 7])
def test_int4_in_the_order_of_onnx(count: int) -> None:
    numbers = np.array([-8, 7, 0, -1, 3, 5, -4], np.int8)[:count]
    data = pack_int4(numbers)
    tensor = helper.make_tensor("t", TensorProto.INT4, [count], data, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), numbers)
    np.testing.assert_array_equal(unpack_int4(data, count), numbers)


def outliers(rows: int = 4096, channels: int = 64) -> Floats:
    """Inputs with some channels far larger than others, as norms of trained models have, and correlated."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((rows, channels)) @ (
        np.eye(channels) + 0.3 * rng.standard_normal((channels, channels))
    )
    values[:, ::16] *= 20
    return values.astype(np.float32)


def test_smoothing_lowers_the_error_of_rounded_matmuls() -> None:
    inputs, weights = outliers(), matrix(64, 48)

    def output(factors: Floats) -> Floats:
        x, w = torch.from_numpy(inputs / factors), torch.from_numpy(weights * factors[:, None])
        x = torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / 127, 0, -128, 127)
        scales = w.abs().amax(0) / 127
        w = torch.fake_quantize_per_channel_affine(w, scales, torch.zeros(len(scales)), 1, -128, 127)
        return (x @ w).numpy()

    factors = smoothing(np.abs(inputs).max(0), [weights], 0.5)
    right = inputs.astype(np.float64) @ weights
    np.testing.assert_allclose((inputs / factors) @ (weights * factors[:, None]), right, rtol=1e-3, atol=1e-2)
    expected = np.abs(inputs).max(0) ** 0.5 / np.abs(weights).max(1) ** 0.5
    np.testing.assert_allclose(factors / factors[0], expected / expected[0], rtol=1e-5)
    plain = np.square(output(np.ones(64, np.float32)) - right).mean()
    assert np.square(output(factors) - right).mean() < 0.3 * plain


@pytest.mark.parametrize("with_gram", [False, True])
def test_awq_lowers_the_error_of_matmuls(with_gram: bool) -> None:
    inputs, weights = outliers(), matrix(64, 48)
    gram = inputs.T.astype(np.float64) @ inputs if with_gram else None
    factors = awq_scales(np.abs(inputs).mean(0), [weights], "int4", 32, gram)
    right = inputs.astype(np.float64) @ weights

    def error(factors: Floats) -> float:
        found = quantise(weights * factors[:, None], "int4", 32, "minmax").dequantised() / factors[:, None]
        return float(np.square(inputs @ found - right).mean())

    assert error(factors) < 0.6 * error(np.ones(64, np.float32))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("channels", [64, 192])  # one block of corrections, and more than one
def test_gptq_lowers_the_error_of_matmuls(group: int | None, channels: int) -> None:
    inputs, weights = outliers(channels=channels), matrix(channels, 48)
    gram = inputs.T.astype(np.float64) @ inputs
    right = inputs.astype(np.float64) @ weights
    found = gptq(weights, gram, "int4", group)
    assert found.values.dtype == np.int8 and found.values.min() >= -8 and found.values.max() <= 7
    plain = quantise(weights, "int4", group, "minmax")
    error = np.square(inputs @ found.dequantised() - right).mean()
    assert error < 0.7 * np.square(inputs @ plain.dequantised() - right).mean()


def test_gptq_of_inputs_that_are_independent_rounds_to_the_nearest() -> None:
    weights = matrix(160, 8)
    found, plain = gptq(weights, np.eye(160), "int4", 32), quantise(weights, "int4", 32, "minmax")
    np.testing.assert_array_equal(found.values, plain.values)
    np.testing.assert_array_equal(found.scales, plain.scales)


def test_gptq_of_two_channels_by_hand() -> None:
    """The second channel takes what the first has lost, as a least squares fit of the second alone would."""
    weights, gram = np.array([[0.3], [7.0]], np.float32), np.array([[1.0, 0.8], [0.8, 1.0]])
    found = gptq(weights, gram, "int4", None)
    damped = gram + 0.01 * np.eye(2)
    lost = 0.3 - 0.0  # the scale is 1
    expected = np.clip(np.rint(7.0 + damped[0, 1] / damped[1, 1] * lost), -8, 7)
    np.testing.assert_array_equal(found.values[:, 0], [0, expected])


# ---- graphs ----


def two_matmuls() -> tuple[onnx.ModelProto, dict[str, Floats]]:
    """x -> norm's Mul -> two matmuls, one with a bias; and one of the input itself."""
    weights = {
        "model.norm": matrix(1, 64, 2)[0] + 2,
        "model.a": matrix(64, 80, 3),
        "model.b": matrix(64, 96, 4),
        "model.b.bias": matrix(1, 96, 5)[0],
        "model.c": matrix(64, 80, 6),
    }
    nodes = [
        helper.make_node("Mul", ["x", "model.norm"], ["n"]),
        helper.make_node("MatMul", ["n", "model.a"], ["a"]),
        helper.make_node("MatMul", ["n", "model.b"], ["b0"]),
        helper.make_node("Add", ["b0", "model.b.bias"], ["b"]),
        helper.make_node("MatMul", ["x", "model.c"], ["c"]),
    ]
    outputs = [value("a", (1, 3, 80)), value("b", (1, 3, 96)), value("c", (1, 3, 80))]
    tensors = tuple(numpy_helper.from_array(array, name) for name, array in weights.items())
    model = model_of(nodes, [value("x", (1, 3, 64))], outputs, tensors)
    model.graph.value_info.extend([value("n", (1, 3, 64)), value("b0", (1, 3, 96))])
    return model, weights


def observed(x: Floats, weights: dict[str, Floats]) -> dict[str, Observed]:
    found = {}
    for name, values in (("a", x * weights["model.norm"]), ("b", x * weights["model.norm"]), ("c", x)):
        found[f"model.{name}"] = Observed.empty(64, gram=True)
        found[f"model.{name}"].add(values, 0)
    return found


def fake_int8(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    scales = w.abs().amax(0) / 127
    w = torch.fake_quantize_per_channel_affine(w, scales, torch.zeros(len(scales)), 1, -127, 127)
    return torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / 127, 0, -128, 127) @ w


def fake_fp8(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (values / scale).to(torch.float8_e4m3fn).float() * scale

    return rounded(x, x.abs().max() / 448) @ rounded(w, w.abs().amax(0) / 448)


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize(("format", "matmul"), [("int8", fake_int8), ("fp8", fake_fp8)])
def test_matmuls_are_those_of_pytorch(format: str, matmul: Callable[..., torch.Tensor], smooth: float | None) -> None:
    model, weights = two_matmuls()
    x = outliers(3, 64)[None]
    recipe = Recipe("r", weights=WeightsRecipe(format), activations=ActivationsRecipe(format), smooth=smooth)
    found = quantise_graphs({"g": model}, recipe, observed(x, weights))
    t = {name: torch.from_numpy(array) for name, array in weights.items()}
    n, c = torch.from_numpy(x) * t["model.norm"], torch.from_numpy(x)
    s_n, s_c = torch.ones(64), torch.ones(64)
    if smooth is not None:
        a_b = torch.maximum(t["model.a"].abs().amax(1), t["model.b"].abs().amax(1))
        s_n = (n.abs().amax((0, 1)) / a_b).sqrt()
        s_c = (c.abs().amax((0, 1)) / t["model.c"].abs().amax(1)).sqrt()
    right = [
        matmul(n / s_n, t["model.a"] * s_n[:, None]),
        matmul(n / s_n, t["model.b"] * s_n[:, None]) + t["model.b.bias"],
        matmul(c / s_c, t["model.c"] * s_c[:, None]),
    ]
    for outputs in (ReferenceEvaluator(found.models["g"]).run(None, {"x": x}), run(found.models["g"], x)):
        for output, expected in zip(outputs, right, strict=True):
            # A number between two others may round either way where the scale differs in its last bit.
            step = float(expected.abs().max()) * (0.01 if smooth is None else 0.03)
            difference = np.abs(output - expected.numpy())
            assert difference.max() < step and np.median(difference) < 0.1 * step
    if smooth is not None:
        assert found.report.scaled == {"model.a": "folded", "model.b": "folded", "model.c": "node"}


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-channel", "int4"])
def test_weights_alone(recipe: str) -> None:
    model, weights = two_matmuls()
    x = outliers(3, 64)[None]
    chosen = dataclasses.replace(RECIPES[recipe], embedding="float32")
    found = quantise_graphs({"g": model}, chosen, observed(x, weights))
    method = chosen.weights.method
    right = []
    for name, values in (("a", x * weights["model.norm"]), ("b", x * weights["model.norm"]), ("c", x)):
        w, s = weights[f"model.{name}"], np.ones(64, np.float32)
        if method == "awq":
            others = [weights["model.c"]] if name == "c" else [weights["model.a"], weights["model.b"]]
            values_of = values.reshape(-1, 64).astype(np.float64)
            gram = values_of.T @ values_of * (1 if name == "c" else 2)  # of both matmuls together
            s = awq_scales(np.abs(values_of).mean(0), others, "int4", 32, gram)
        dequantised = quantise(w * s[:, None], chosen.weights.format, chosen.weights.group,
                               "minmax" if method == "awq" else method).dequantised()  # fmt: skip
        right.append((values / s) @ dequantised + (weights["model.b.bias"] if name == "b" else 0))
    for output, expected in zip(ReferenceEvaluator(found.models["g"]).run(None, {"x": x}), right, strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-3)


def run(model: onnx.ModelProto, x: Floats) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def operators(path: Path, tmp_path: Path, disabled: list[str]) -> Counter[str]:
    """Of the graph that ONNX Runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("recipe", "operator"),
    [("int8", "MatMulIntegerToFloat"), ("int8-weight-only", "MatMulNBits"), ("int8-channel", "MatMulNBits"),
     ("int4", "MatMulNBits")],
)  # fmt: skip
def test_onnx_runtime_finds_every_quantised_matmul(
    quantised_bundle: Callable[[Recipe], Path], recipe: str, operator: str, tmp_path: Path
) -> None:
    """A matmul that it does not find has its weight dequantised in every call, many times slower."""
    bundle = read_bundle(quantised_bundle(RECIPES[recipe]))
    matmuls = {name for name, format in bundle.quantization.matmuls.items() if format != "float32"}
    for path in bundle.graph_paths().values():
        nodes = onnx.load(path, load_external_data=False).graph.node
        sources = {node.output[0]: node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
        uses = sum(
            any(sources.get(node.input[1], "").startswith(name + ".") for name in matmuls)
            for node in nodes
            if node.op_type == "MatMul"
        )
        found = operators(path, tmp_path, ["CommonSubexpressionElimination"] if recipe == "int8" else [])
        assert uses >= len(matmuls) and found[operator] == uses


@pytest.mark.parametrize("recipe", ["int8", "int8-channel", "int4", "fp8", "float16"])
def test_graphs_of_bundles_in_onnx_reference(quantised_bundle: Callable[[Recipe], Path], recipe: str) -> None:
    checks = check_graphs(read_bundle(quantised_bundle(RECIPES[recipe])), 0.05)
    assert checks and all(check.passed for check in checks), max(checks, key=lambda check: check.max_abs_error)


def weights_of(found: Quantised) -> list[dict[str, bytes]]:
    return [
        {t.name: t.SerializeToString() for t in model.graph.initializer if t.name.startswith("model.")}
        for model in found.models.values()
    ]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_same_numbers_in_every_graph_and_every_time(quantise: Callable[[Recipe], Quantised], recipe: str) -> None:
    first, second = quantise(RECIPES[recipe]), quantise(RECIPES[recipe])
    for name, model in first.models.items():
        assert model.SerializeToString(deterministic=True) == second.models[name].SerializeToString(deterministic=True)
    graphs = weights_of(first)
    for graph in graphs[1:]:
        for name in set(graph) & set(graphs[0]):
            assert graph[name] == graphs[0][name], name
    chosen = {name for name, format in first.report.matmuls.items() if format != "float32"}
    assert chosen and all(not {name for name in graph if name in chosen} for graph in graphs), "float32 is still there"
    assert all(any(name.startswith(f"{weight}.") for name in graphs[0]) for weight in chosen)


def test_what_stays_float32_is_said(quantise: Callable[[Recipe], Quantised]) -> None:
    kept = quantise(dataclasses.replace(RECIPES["int8-weight-only"], keep=("*.ff.*",))).report.kept
    assert kept["model.layers.0.ff.up.weight"] == "the recipe keeps it"
    assert "fewer than 4096 elements" in kept["model.layers.0.memory.out.weight"]
    group = quantise(dataclasses.replace(RECIPES["int8-weight-only"], weights=WeightsRecipe("int4", group=128))).report
    assert group.kept["model.head.weight"] == "its 64 input channels are no multiple of the group 128"


def test_a_permutation_stays_exact() -> None:
    model, weights = two_matmuls()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.eye(64, 80, dtype=np.float32), "model.a"))
    report = quantise_graphs({"g": model}, RECIPES["int8-channel"], None).report
    assert "permutation" in report.kept["model.a"] and report.matmuls["model.b"] == "int8"
    assert weights


def test_formats_for_weights_one_by_one() -> None:
    model, _ = two_matmuls()
    formats = {"model.a": "float32", "model.b": "float16"}
    report = quantise_graphs({"g": model}, RECIPES["int8-channel"], None, formats).report
    assert report.matmuls == {"model.a": "float32", "model.b": "float16", "model.c": "int8"}
    with pytest.raises(QuantiseError, match=r"model\.d is no weight of a matmul"):
        quantise_graphs({"g": model}, RECIPES["int8-channel"], None, {"model.d": "int8"})


def test_what_cannot_be_quantised_is_refused() -> None:
    model, weights = two_matmuls()
    with pytest.raises(QuantiseError, match="observations"):
        quantise_graphs({"g": model}, RECIPES["int8"], None)
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights["model.a"] + 1, "model.a"))
    with pytest.raises(QuantiseError, match=r"model\.a differs between graphs"):
        quantise_graphs({"g": model, "h": other}, RECIPES["int8-channel"], None)
    huge = onnx.ModelProto.FromString(model.SerializeToString())
    huge.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights["model.a"] * np.float32(1e6), "model.a"))
    with pytest.raises(QuantiseError, match=r"model\.a exceed float16"):
        quantise_graphs({"g": huge}, RECIPES["float16"], None)


def test_weights_that_something_else_reads_stay() -> None:
    model, _ = two_matmuls()
    model.graph.node.append(helper.make_node("ReduceSum", ["model.a"], ["sum"], keepdims=0))
    model.graph.output.append(value("sum", ()))
    report = quantise_graphs({"g": model}, RECIPES["int8-channel"], None).report
    assert report.kept == {"model.a": "it is read by more than matmuls"}


def test_a_norm_that_a_branch_reads_keeps_its_values() -> None:
    model, weights = two_matmuls()
    branches = [
        helper.make_graph([helper.make_node(operator, ["n"], [name])], name, [], [value(name, (1, 3, 64))])
        for operator, name in (("Identity", "t"), ("Neg", "e"))
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["seen"], then_branch=branches[0], else_branch=branches[1]))
    model.graph.output.append(value("seen", (1, 3, 64)))
    x = outliers(3, 64)[None]
    found = quantise_graphs({"g": model}, RECIPES["int8"], observed(x, weights))
    np.testing.assert_array_equal(run(found.models["g"], x)[-1], x * weights["model.norm"])
    assert found.report.scaled["model.a"] == "node"


def test_matmuls_of_one_format_share_their_input_beside_another() -> None:
    model, weights = two_matmuls()
    model.graph.node[4].input[0] = "n"  # three matmuls of one input
    x = outliers(3, 64)[None]
    seen = observed(x, weights)
    seen["model.c"] = seen["model.a"]
    recipe = dataclasses.replace(RECIPES["int4"], embedding="float32")
    found = quantise_graphs({"g": model}, recipe, seen, {"model.a": "int8"}).models["g"]
    factors = [t.name for t in found.graph.initializer if t.name.endswith(".input_factors")]
    assert sorted(factors) == ["model.a.input_factors", "model.b.input_factors"]


@pytest.mark.parametrize("format", ["int8", "float16"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_table_that_is_not_finite_is_refused(format: str, number: float) -> None:
    """In int8 one such number would take its channel from every token."""
    table = matrix(96, 64)
    table[3, 5] = number
    ids = helper.make_tensor_value_info("x", TensorProto.INT64, (1, 3))
    model = model_of(
        [helper.make_node("Gather", ["table", "x"], ["y"])], [ids], [value("y", (1, 3, 64))],
        (numpy_helper.from_array(table, "table"),),
    )  # fmt: skip
    with pytest.raises(QuantiseError, match="weights in table are not finite"):
        quantise_graphs({"g": model}, Recipe("r", embedding=format), None)


# ---- the bundle's files ----


def test_files_and_manifest(
    small_bundle: Path,
    quantise: Callable[[Recipe], Quantised],
    quantised_bundle: Callable[[Recipe], Path],
    tmp_path: Path,
) -> None:
    recipe = RECIPES["int8"]
    before, after = read_bundle(small_bundle), read_bundle(quantised_bundle(recipe))
    entry = after.quantization
    assert entry is not None and entry.recipe == json.loads(json.dumps(recipe.as_dict()))
    assert entry.matmuls["model.head.weight"] == "int8"
    assert entry.weights_bytes == after.manifest.files["weights.safetensors"].bytes
    assert entry.weights_bytes < 0.45 * (entry.float32_weights_bytes or 0)
    assert 0 < (entry.max_abs_error or 0) <= after.tolerance / 2
    for name in ("inputs", "values"):  # golden data are the float32 model's
        np.testing.assert_array_equal(getattr(before.golden(), name), getattr(after.golden(), name))
    data = {"xxh3_128": "0" * 32, "tokens": 5, "streams": 1}
    for name in ("one", "two"):
        options = QuantizeOptions(small_bundle, tmp_path / name, recipe, seed=7)
        write_quantised(before, quantise(recipe), options, data=data)
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()
    assert read_bundle(tmp_path / "one").manifest.raw["quantization"]["data"] == data
    with pytest.raises(UsageError, match="already quantised"):
        open_source(after)


@pytest.mark.parametrize(("error", "before", "after"), [(0.01, 0.1, 0.1), (0.06, 0.1, 0.2), (1.4, 1e-4, 3.0)])
def test_tolerance(error: float, before: float, after: float) -> None:
    assert tolerance_of(error, before) == pytest.approx(after)


def test_noise_is_observed(small_bundle: Path) -> None:
    """What other tests quantise by has outliers."""
    seen = observe_noise(open_source(read_bundle(small_bundle)).models)
    assert all(o.channels.max() > 4 * np.median(o.channels) for o in seen.values())


def test_memories_do_not_share_their_noise() -> None:
    names = ("a.memory", "b.memory")
    kinds = {"W0": "weights", "S0": "surprise"}
    layout = [
        {"name": name, "offset": 1024 * i, "shape": [32, 32], "kind": kind}
        for i, (name, kind) in enumerate(kinds.items())
    ]
    state = [state_tensor(name, shape=[1, 1, 2048], layout=layout) for name in names]
    nodes = [
        helper.make_node("NeuralMemory", [n, "q"], [f"{n}.y", f"{n}.next"], domain="ai.titans", mode="update")
        for n in names
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(n, 1, [1, 1, 2048]) for n in names], [])
    store_memories({"decode": (model := helper.make_model(graph))}, state, MemoryRecipe("int8", "stochastic", 5))
    assert [next(a.i for a in node.attribute if a.name == "seed") for node in model.graph.node] == [5, 6]


def test_functions_that_a_loop_calls_stay() -> None:
    """Of a graph whose memories get other nodes, only the memories' functions go."""
    layout = [{"name": "W0", "offset": 0, "shape": [32, 32], "kind": "weights"}]
    state = [state_tensor("m", output="n", shape=[1, 1, 1024], layout=layout)]
    opsets = [helper.make_opsetid("", 20)]
    functions = [
        helper.make_function(domain, name, ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], opsets)
        for domain, name in (("mine", "Inner"), ("ai.titans", "NeuralMemory"))
    ]
    branches = [
        helper.make_graph([helper.make_node("Inner", ["m2"], [out], domain="mine")], out, [], [value(out, (1,))])
        for out in "te"
    ]
    nodes = [
        helper.make_node("NeuralMemory", ["m", "q"], ["y", "n"], domain="ai.titans", mode="update"),
        helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1]),
    ]
    graph = helper.make_graph(nodes, "g", [value("m", (1, 1, 1024))], [])
    store_memories({"g": (model := helper.make_model(graph, functions=functions))}, state, MemoryRecipe("int8"))
    assert [function.name for function in model.functions] == ["Inner"]
