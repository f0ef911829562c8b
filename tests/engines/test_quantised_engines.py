"""Engines of quantised bundles: built by TensorRT-RTX without a GPU, run by ONNX Runtime, refused where none can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from engine_tools import model_of, value
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from quantised_tools import RECIPES, with_memory
from safetensors import safe_open

from titans_calibration.weights import pack_int4
from titans_export.bundle import read_bundle
from titans_export.cli import main
from titans_export.engines.build import build_engine
from titans_export.engines.plan import Request, make_plan
from titans_export.engines.precision import PrecisionError, lower_precision
from titans_export.engines.quantised import for_compiler, fuse_dequantised, weights_alone
from titans_export.errors import MachineError, UsageError
from titans_export.onnx.files import load_graph
from titans_export.onnx.mapped import write_graph
from titans_export.onnx.nodes import attribute, is_memory

pytest_plugins = ["quantised_fixtures"]
Make = Callable[[Any], Path]
TEXT = np.arange(60, dtype=np.int32) % 96


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int4", "fp8", "float16"])
def test_rtx_builds(quantised_bundle: Make, recipe: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    request = Request(target="rtx-40", precision=precision, graphs=["decode"])
    report = build_engine(quantised_bundle(RECIPES[recipe]), request, output=tmp_path / "out.titans")
    layers = report.graphs[0]["layers"]
    assert layers["matrix_multiply"] > 0
    # What is left of the quantisation in the network that the parser made. Of int8 in blocks nothing is.
    products = 0 if recipe in ("int8-weight-only", "float16") else 5
    assert layers.get("dequantize", 0) >= products
    assert (layers.get("quantize", 0) > 0) == (recipe in ("int8", "fp8"))


@pytest.mark.parametrize("element", [TensorProto.INT8, TensorProto.INT4])
def test_matmuls_of_one_weight_share_the_kernels_form_of_it(element: int) -> None:
    """ONNX Runtime itself fuses no weight that a graph multiplies twice. Rows of the identity give the weight back."""
    draw = np.random.default_rng(0)
    least = -128 if element == TensorProto.INT8 else -8
    values = draw.integers(least, -least, (64, 48))
    values[0, :2] = least, -least - 1
    data = pack_int4(values.astype(np.int8)) if element == TensorProto.INT4 else values.astype(np.int8).tobytes()
    scales = draw.uniform(0.5, 2.0, (2, 48)).astype(np.float32)
    model = model_of(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="d", axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "d"], ["y"], name="one"),
            helper.make_node("MatMul", ["z", "d"], ["u"], name="other"),
        ],
        [value("x", [64, 64]), value("z", [3, 64])],
        [value("y", [64, 48]), value("u", [3, 48])],
        (helper.make_tensor("w", element, [64, 48], data, raw=True), numpy_helper.from_array(scales, "s")),
    )
    model.opset_import[0].version = 21
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    fuse_dequantised(model)
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "MatMulNBits"]
    assert model.graph.node[0].input[1:] == model.graph.node[1].input[1:]
    assert len(model.graph.initializer) == 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    few = draw.standard_normal((3, 64)).astype(np.float32)
    y, u = session.run(None, {"x": np.eye(64, dtype=np.float32), "z": few})
    right = values * np.repeat(scales, 32, axis=0)
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u, few @ right, atol=0.02 * float(np.abs(few @ right).max()))


def test_int4_blocks_that_rtx_takes(quantised_bundle: Make) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    from titans_export.engines.vendor import Settings, build_plan

    folder = quantised_bundle(RECIPES["int4"]).parent
    for block in (16, 64, 128):
        values = helper.make_tensor("q", TensorProto.INT4, [256, 96], bytes(256 * 48), raw=True)
        scale = numpy_helper.from_array(np.ones((256 // block, 96), np.float32), "s")
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=block),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        model = model_of(nodes, [value("x", (1, 1, 256))], [value("y", (1, 1, 96))], (values, scale))
        model.opset_import[0].version = 21
        path = write_graph(for_compiler(model), folder / f"block{block}.onnx")
        assert build_plan(trt, path, Settings(capabilities=(89,))).layers["dequantize"] == 1


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_cpu_engine_computes_what_the_graphs_do(
    quantised_bundle: Make, small_bundle: Path, recipe: str, tmp_path: Path
) -> None:
    import titans_runtime

    source = quantised_bundle(RECIPES[recipe])
    report = build_engine(source, Request(target="cpu"), output=tmp_path / "out.titans")
    outputs = []
    for engine in ("none", report.engine["name"]):
        with titans_runtime.Session(tmp_path / "out.titans", engine=engine) as session:
            outputs.append(session.stream().feed(TEXT))
    bundle = read_bundle(tmp_path / "out.titans")
    if recipe == "int8":  # its products round no input by one scale any more
        golden = float32_outputs(read_bundle(small_bundle))
        errors = [np.abs(output - golden).mean() for output in outputs]
        assert 0 < errors[1] < errors[0]
    else:
        np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)
    assert sum(graph["bytes"] for graph in report.graphs) < 400_000
    if recipe in ("fp8", "float16", "bfloat16"):  # whose weights stay where they are
        assert "weights" not in report.engine
        return
    # What the engine's own file holds is there once, however many graphs read it.
    own = bundle.path / report.engine["weights"]["file"]
    assert own.stat().st_size < 1.2 * bundle.quantization.weights_bytes
    names = [set(entry["weights"]) for entry in report.engine["graphs"]]
    with safe_open(own, "numpy") as file:
        held = set(file.keys())
    assert held <= set.union(*names) and held & set.intersection(*names)


def float32_outputs(bundle: Any) -> np.ndarray:
    import titans_runtime

    with titans_runtime.Session(bundle.path) as session:
        return session.stream().feed(TEXT)


def test_int8_weights_alone_are_the_same_weights(quantised_bundle: Make) -> None:
    """Blocks have the scales of their channels, and products read what came before the rounding."""
    graph = load_graph(read_bundle(quantised_bundle(RECIPES["int8"])).graph_paths()["decode"])
    after = weights_alone(graph)
    onnx.checker.check_model(after)
    before_weights, after_weights = dequantised(graph), dequantised(after)
    assert len(after_weights) >= 5
    for name, weight in after_weights.items():
        np.testing.assert_array_equal(weight, before_weights[name.removesuffix(".blocks")])
    assert not any(node.op_type == "QuantizeLinear" for node in after.graph.node)
    assert any(node.op_type == "QuantizeLinear" for node in graph.graph.node), "the graph is left as it was"


def dequantised(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What ONNX's own reference makes of the weights of products, by the name of the value."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    second = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in second and node.input[0] in weights:
            inputs = [weights[name] for name in node.input]
            found[node.output[0]] = ReferenceEvaluator(node).run(None, dict(zip(node.input, inputs, strict=True)))[0]
    return found


@pytest.mark.parametrize("target", ["orin-agx", "orin-nano", "rtx-30", "a100"])
def test_fp8_is_refused_below_compute_capability_89(quantised_bundle: Make, target: str) -> None:
    bundle = read_bundle(quantised_bundle(RECIPES["fp8"]))
    with pytest.raises(MachineError, match=r"sm_89 or newer .*rtx-40.* got .*\. Fix: quantize with --recipe int8"):
        make_plan(bundle, Request(target=target))
    assert make_plan(bundle, Request(target="l4", compiler="tensorrt")).precision == "fp32"
    result = CliRunner().invoke(main, ["build", str(bundle.path), "--target", target, "--dry-run"])
    assert result.exit_code == 4 and "sm_89" in result.output


def test_a_memory_in_few_bits_needs_the_plugin(small_bundle: Path, tmp_path: Path) -> None:
    """Said from the nodes alone, so that no kernel is needed here."""
    from titans_calibration.memories import store_memories

    bundle = read_bundle(small_bundle)
    models = {name: load_graph(path) for name, path in bundle.graph_paths().items()}
    state = store_memories(models, bundle.manifest.state, with_memory("int8", "int8").memory)
    for name, path in bundle.graph_paths().items():
        (tmp_path / path.name).write_bytes(models[name].SerializeToString())
    changed = type(bundle)(tmp_path, dataclasses.replace(bundle.manifest, state=state))
    with pytest.raises(MachineError, match=r"tensorrt_rtx runs standard operators only.*--compiler tensorrt"):
        make_plan(changed, Request(target="rtx-40"))
    plan = make_plan(changed, Request(target="orin-agx"))
    assert plan.plugin
    prepared = plan.prepare(plan.graphs[0])
    memory_dtypes = {attribute(node, "memory_dtype") for node in prepared.graph.node if is_memory(node)}
    assert memory_dtypes == {"int8"} and not prepared.functions


def test_the_precision_is_that_of_the_weights(quantised_bundle: Make) -> None:
    half, integers = (read_bundle(quantised_bundle(RECIPES[name])) for name in ("float16", "int8"))
    assert make_plan(half, Request(target="rtx-40")).precision == "fp16"
    assert make_plan(half, Request(target="cpu")).precision == "fp32"
    assert make_plan(integers, Request(target="rtx-40")).precision == "fp32"
    with pytest.raises(UsageError, match="weights in fp16: expected fp16 or fp32, got bf16"):
        make_plan(half, Request(target="rtx-40", precision="bf16"))


def test_weights_in_float16_are_not_rounded_again(quantised_bundle: Make) -> None:
    path = read_bundle(quantised_bundle(RECIPES["float16"])).graph_paths()["decode"]
    before = {t.name: t.raw_data for t in load_graph(path).graph.initializer}
    graph = lower_precision(load_graph(path), "fp16", memory=False).graph
    half = {t.name: t.raw_data for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    makers = {node.output[0]: node for node in graph.node}
    direct = [n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1].endswith(".weight.float16")]
    assert len(direct) >= 5 and all(half[name] == before[name] for name in direct)
    assert not any(n.input[1] in makers and makers[n.input[1]].op_type == "Cast" and "weight" in n.input[1]
                   for n in graph.node if n.op_type == "MatMul")  # fmt: skip


def test_scales_take_the_precision_of_products(quantised_bundle: Make) -> None:
    """Between what dequantises and the product there is nothing, or compilers see no quantised product."""
    path = read_bundle(quantised_bundle(RECIPES["int8"])).graph_paths()["decode"]
    graph = lower_precision(load_graph(path), "fp16", memory=False).graph
    types = {t.name: t.data_type for t in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = 0
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in makers:
            weight = makers[node.input[1]]
            if weight.op_type == "DequantizeLinear" and weight.input[0].endswith(".weight.int8"):
                found += 1
                other = makers[node.input[0]]
                assert other.op_type == "DequantizeLinear"
                assert types[weight.input[1]] == types[other.input[1]] == TensorProto.FLOAT16
                assert types[makers[other.input[0]].input[1]] == TensorProto.FLOAT
    assert found >= 5


def test_scales_that_float16_does_not_hold() -> None:
    values = numpy_helper.from_array(np.ones((64, 64), np.int8), "q")
    scale = numpy_helper.from_array(np.full(64, 1e-9, np.float32), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = model_of(nodes, [value("x", (1, 64))], [value("y", (1, 64))], (values, scale))
    with pytest.raises(
        PrecisionError, match=r"fp16 is too coarse for the scales in s.* at most 1%, got .* for 1e-09.*--precision bf16"
    ):
        lower_precision(model, "fp16", memory=False)
    assert lower_precision(model, "bf16", memory=False).graph.node


def test_compilers_get_the_same_numbers(quantised_bundle: Make) -> None:
    """What is changed for a compiler changes no output."""
    from graph_feeds import feed_of

    for recipe in ("int8", "int8-weight-only", "int4"):
        bundle = read_bundle(quantised_bundle(RECIPES[recipe]))
        path = bundle.graph_paths()["decode"]
        before, after = load_graph(path), for_compiler(load_graph(path))
        blocks = [n for n in after.graph.node if n.op_type == "DequantizeLinear" and attribute(n, "block_size")]
        assert bool(blocks) == (recipe == "int4")
        np.testing.assert_allclose(feed_of(bundle, after), feed_of(bundle, before), atol=1e-5)


def test_weights_that_a_branch_within_a_loop_reads_stay() -> None:
    """Where a compiler gets a changed graph, however deep what reads them lies."""
    branch = helper.make_graph([helper.make_node("Add", ["s", "deep"], ["d"])], "b", [], [value("d", (4,))])
    body = helper.make_graph(
        [helper.make_node("If", ["yes"], ["o"], then_branch=branch, else_branch=branch)], "loop",
        [value("s", (4,)), value("i", (4,))], [value("o", (4,))],
    )  # fmt: skip
    scan = helper.make_node("Scan", ["x", "xs"], ["y"], body=body, num_scan_inputs=1)
    tensors = (numpy_helper.from_array(np.ones(4, np.float32), "deep"), numpy_helper.from_array(np.array(True), "yes"))
    model = model_of([scan], [value("x", (4,)), value("xs", (3, 4))], [value("y", (4,))], tensors)
    assert {tensor.name for tensor in for_compiler(model).graph.initializer} == {"deep", "yes"}
