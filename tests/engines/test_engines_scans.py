"""Scans with branches, written out for compilers that nest no If in a loop: against NumPy, and really built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_tools import model_of, session, value
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from titans_export.checkpoints import LoadOptions, load_checkpoint
from titans_export.engines import graphs, tensorrt_rtx
from titans_export.engines.messages import BuildError
from titans_export.engines.scans import unroll_scans
from titans_export.engines.vendor import Settings, build_plan
from titans_export.errors import BundleError
from titans_export.onnx.graphs import SLOTS_INPUT, export_graph
from titans_export.onnx.mapped import write_graph
from titans_export.onnx.streams import fix_streams

STEPS, WIDTH = 5, 8
CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "titans-pytorch-bytes"
Floats = NDArray[np.float32]


def looped(**attributes: Any) -> onnx.ModelProto:
    """s <- s + x_t W, doubled where its sum is above the threshold; s and its negative of every step come out."""
    branches = {
        # One of them reads what is outside of the loop, both what is inside.
        "then_branch": helper.make_graph(
            [helper.make_node("Mul", ["moved", "two"], ["doubled"])], "yes", [], [value("doubled", (1, WIDTH))]
        ),
        "else_branch": helper.make_graph(
            [helper.make_node("Identity", ["moved"], ["kept"])], "no", [], [value("kept", (1, WIDTH))]
        ),
    }
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x_t", "weights"], ["product"]),
            helper.make_node("Add", ["s_in", "product"], ["moved"]),
            helper.make_node("ReduceSum", ["moved"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "threshold"], ["above"]),
            helper.make_node("If", ["above"], ["s_out"], name="choice", **branches),
            helper.make_node("Neg", ["s_out"], ["negative"]),
        ],
        "body",
        [value("s_in", (1, WIDTH)), value("x_t", (1, WIDTH))],
        [value("s_out", (1, WIDTH)), value("negative", (1, WIDTH))],
        [numpy_helper.from_array(np.float32(0.5), "threshold")],
    )
    fixed: dict[str, Any] = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1]}
    scan = helper.make_node("Scan", ["s", "x"], ["last", "all"], name="loop", body=body, **fixed, **attributes)
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    return model_of(
        [scan],
        [value("s", (1, WIDTH)), value("x", (1, STEPS, WIDTH))],
        [value("last", (1, WIDTH)), value("all", (1, STEPS, WIDTH))],
        (numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.float32(2), "two")),
    )


def expected(model: onnx.ModelProto, s: Floats, x: Floats) -> tuple[Floats, Floats, list[bool]]:
    weights = numpy_helper.to_array(model.graph.initializer[0])
    states, taken = [], []
    for t in range(STEPS):
        s = s + x[:, t] @ weights
        taken.append(bool(s.sum() > 0.5))
        s = s * 2 if taken[-1] else s
        states.append(s)
    return s, -np.stack(states, 1), taken


def test_unrolled_is_the_loop() -> None:
    model = looped()
    unrolled = unroll_scans(model)
    onnx.checker.check_model(unrolled, full_check=True)
    assert {node.op_type for node in unrolled.graph.node} >= {"If", "MatMul"}
    assert not any(node.op_type == "Scan" for node in unrolled.graph.node)
    assert any(node.op_type == "Scan" for node in model.graph.node), "the model that was given has changed"
    rng = np.random.default_rng(1)
    ways = set()
    for _ in range(4):
        s = rng.standard_normal((1, WIDTH)).astype(np.float32)
        x = rng.standard_normal((1, STEPS, WIDTH)).astype(np.float32)
        last, everything, taken = expected(model, s, x)
        ways |= set(taken)
        got = session(unrolled).run(["last", "all"], {"s": s, "x": x})
        np.testing.assert_allclose(got[0], last, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[1], everything, rtol=1e-5, atol=1e-5)
    assert ways == {True, False}


def test_loops_without_branches_stay() -> None:
    model = looped()
    body = next(entry.g for entry in model.graph.node[0].attribute if entry.name == "body")
    place = next(i for i, node in enumerate(body.node) if node.op_type == "If")
    body.node[place].CopyFrom(helper.make_node("Identity", ["moved"], ["s_out"]))
    assert unroll_scans(model).SerializeToString() == model.SerializeToString()


def test_what_cannot_be_unrolled_is_refused() -> None:
    with pytest.raises(BundleError, match="at loop: it runs backwards"):
        unroll_scans(looped(scan_input_directions=[1]))
    model = looped()
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "steps"
    with pytest.raises(BundleError, match="at loop: its length is unknown"):
        unroll_scans(model)


@pytest.mark.long
def test_a_memory_is_built_so_and_not_otherwise(tmp_path: Path) -> None:
    """The end of a segment, where several rows go through a memory of titans-pytorch."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    settings = Settings(capabilities=tensorrt_rtx.CAPABILITIES[:1])
    options = LoadOptions(str(CHECKPOINT / "model.json"))
    model = load_checkpoint(CHECKPOINT / "model.safetensors", "titans-pytorch", options).model
    graph = next(graph for graph in model.graphs(1) if graph.name == "segment_end")
    source = export_graph(model, graph)
    fix_streams(source, SLOTS_INPUT, 1)
    inlined = graphs.inline(source)
    path = write_graph(unroll_scans(inlined), tmp_path / "unrolled.onnx")
    assert build_plan(trt, path, settings).plan
    # What the rewriting is for: were this to build, it could go.
    with pytest.raises(BuildError, match="No nesting relationship"):
        build_plan(trt, write_graph(inlined, tmp_path / "looped.onnx"), settings)
