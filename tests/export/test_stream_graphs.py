"""Graphs traced for an unlikely number of streams, which becomes a symbol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tolerances import TOLERANCES
from variants import CONFIGS

from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans import load
from titans_export.model import Call, Graph
from titans_export.onnx.streams import SLOTS, STREAMS, fix_streams, free_streams, unlikely_numbers
from titans_export.running import memory_kernel, open_session

pytest_plugins = ["export_fixtures"]
TOLERANCE = TOLERANCES["cpu", "float32"]
B, P = 11, 13
ROW = np.arange(6, dtype=np.float32)[None]
DIFFERENT = np.arange(B, dtype=np.float32)[:, None]


def made(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]]) -> onnx.ModelProto:
    """A model from x (B, 6) and pool (P, 2) to y, whose shape is inferred."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, 6]),
            helper.make_tensor_value_info("pool", TensorProto.FLOAT, [P, 2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def reshapes(*shapes: list[int]) -> onnx.ModelProto:
    """x reshaped to each shape in turn. The nodes say that 0 is a dimension of no elements, as traced ones do."""
    names = ["x", *(f"x{i}" for i in range(len(shapes) - 1)), "y"]
    nodes = [
        helper.make_node("Reshape", [names[i], f"shape{i}"], [names[i + 1]], allowzero=1) for i in range(len(shapes))
    ]
    return made(nodes, {f"shape{i}": np.array(shape) for i, shape in enumerate(shapes)})


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_the_numbers_divide_no_dimension() -> None:
    assert unlikely_numbers([8, 64, 0]) == (101, 103)
    assert unlikely_numbers([202, 50_257, 107 * 3]) == (103, 109)
    streams, slots = unlikely_numbers(range(1, 1000))
    assert streams == 1009
    assert slots == 1013


def test_a_graph_runs_for_any_number_of_streams() -> None:
    # Split into heads, joined; a dimension that is left to the node; rows of all streams as one matrix.
    model = reshapes([B, 3, 2], [B, -1, 1], [B * 6, 1], [B, 2, -1], [B, 6])
    free_streams(model, B, P)
    assert dims(model.graph.input[0]) == [STREAMS, 6]
    assert dims(model.graph.input[1]) == [SLOTS, 2]
    assert dims(model.graph.output[0]) == [STREAMS, 6]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5, B):
        x = np.random.default_rng(count).random((count, 6), np.float32)
        (y,) = session.run(None, {"x": x, "pool": np.zeros((count + 1, 2), np.float32)})
        assert np.array_equal(y, x)


def test_a_shape_that_nodes_share_is_divided() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["all"]),  # one matrix of all streams' rows
        helper.make_node("Reshape", ["x", "split"], ["a"]),
        helper.make_node("Reshape", ["all", "split"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    model = made(nodes, {"flat": np.array([6 * B]), "split": np.array([B, 3, 2])})
    free_streams(model, B, P)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((4, 6), np.float32), "pool": np.zeros((1, 2), np.float32)})
    assert np.array_equal(y, np.zeros((4, 3, 2)))


def test_equal_parts_of_a_constant_and_an_own_dimension_are_broadcast() -> None:
    constants = {"c": ROW.repeat(B, 0), "d": ROW.repeat(B, 0), "to": np.array([3, B, 12])}
    constants |= {"row": np.ones((1, 1), np.float32), "each": np.array([B, 12])}
    nodes = [
        helper.make_node("Add", ["x", "c"], ["sum"]),
        helper.make_node("Concat", ["sum", "d"], ["both"], axis=1),
        helper.make_node("Expand", ["row", "each"], ["rows"]),
        helper.make_node("Add", ["both", "rows"], ["all"]),
        helper.make_node("Expand", ["all", "to"], ["y"]),
    ]
    model = made(nodes, constants)
    free_streams(model, B, P)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.ones((2, 6), np.float32)
    (y,) = session.run(None, {"x": x, "pool": np.zeros((1, 2), np.float32)})
    assert np.array_equal(y, np.broadcast_to(1 + np.hstack([x + ROW, ROW.repeat(2, 0)]), (3, 2, 12)))


@pytest.mark.parametrize("on", [True, False])
def test_branches_are_freed(on: bool) -> None:
    yes = reshapes([B, 2, 3], [B, 6]).graph
    del yes.input[:]
    # A branch whose result is a constant.
    no = helper.make_graph(
        [helper.make_node("Constant", [], ["none"], value=numpy_helper.from_array(ROW.repeat(B, 0)))],
        "no",
        [],
        [helper.make_tensor_value_info("none", TensorProto.FLOAT, [B, 6])],
    )
    condition = helper.make_node("Constant", [], ["on"], value=numpy_helper.from_array(np.array(on)))
    model = made([condition, helper.make_node("If", ["on"], ["y"], then_branch=yes, else_branch=no)], {})
    free_streams(model, B, P)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.ones((4, 6), np.float32)
    (y,) = session.run(None, {"x": x, "pool": np.zeros((1, 2), np.float32)})
    assert np.array_equal(y, x if on else ROW.repeat(4, 0))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (made([helper.make_node("Expand", ["row", "to"], ["y"])], {"row": ROW, "to": np.array([2, B, 6])}), "in front"),
        (made([helper.make_node("Tile", ["x", "to"], ["y"])], {"to": np.array([B, 1])}), "a Tile reads a shape"),
        (made([helper.make_node("Add", ["x", "c"], ["y"])], {"c": ROW.repeat(B, 0) * DIFFERENT}), "depends on"),
        (reshapes([B, 2, 3], [B * 2, 3], [2, B, 3], [B, 2 * B, 3]), "in two places"),
    ],
    ids=["expand", "tile", "different rows", "two places"],
)
def test_a_place_that_cannot_be_replaced_is_found(model: onnx.ModelProto, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        free_streams(model, B, P)


def test_a_fixed_number_of_streams_needs_no_slots() -> None:
    model = made([helper.make_node("Gather", ["x", "slots"], ["y"])], {})
    model.graph.input.append(helper.make_tensor_value_info("slots", TensorProto.INT64, [B]))
    model = onnx.shape_inference.infer_shapes(model)
    free_streams(model, B, P)
    fix_streams(model, "slots", 3)
    assert [value.name for value in model.graph.input] == ["x", "pool"]
    assert [dims(value) for value in model.graph.input] == [[3, 6], [3, 2]]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((3, 6), np.float32)
    assert np.array_equal(session.run(None, {"x": x, "pool": np.zeros((3, 2), np.float32)})[0], x)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "function bodies"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_streams_of_a_call_are_independent(
    variant: str, kernel: bool, checkpoints: dict[str, Path], bundles: dict[str, Path]
) -> None:
    """Each of three streams, at its own position and slot, gives what PyTorch gives for it alone."""
    model, bundle = load(checkpoints[variant]).model, read_bundle(bundles[variant])
    library = memory_kernel() if kernel else None
    assert library is not None or not kernel
    generator = torch.Generator().manual_seed(3)
    slots = torch.tensor([4, 0, 2])
    for entry in bundle.manifest.graphs:
        graph = Graph(entry.name, entry.tokens, entry.stride, tuple(entry.offsets))
        position = torch.tensor([0, 3, 11]) * entry.stride
        pool = {name: value.detach().clone() for name, value in model.initial_state(5).items()}
        for slot, fed in zip(slots.tolist(), position.tolist(), strict=True):
            history = torch.randint(model.config.vocab_size, (1, fed), generator=generator)
            _, state = model.feed(history, {name: value[slot : slot + 1] for name, value in pool.items()}, 0)
            for name, value in state.items():
                pool[name][slot] = value[0]
        tokens = torch.randint(model.config.vocab_size, (3, entry.tokens), generator=generator)
        learn = torch.tensor([True, False, True])
        feeds = {
            bundle.manifest.input.name: tokens,
            bundle.manifest.controls.position: position,
            bundle.manifest.controls.learn: learn,
            bundle.manifest.controls.slots: slots,
            **pool,
        }
        session = open_session(bundle.path / entry.file, kernel=library)
        names = {value.name for value in session.get_inputs()}
        given = {name: np.ascontiguousarray(value.numpy()) for name, value in feeds.items() if name in names}
        results = [value.name for value in session.get_outputs()]
        outputs: dict[str, NDArray[np.float32]] = dict(zip(results, session.run(results, given), strict=True))
        for b, slot in enumerate(slots.tolist()):
            alone = {name: value[slot : slot + 1].clone() for name, value in pool.items()}
            call = Call(graph, position[b : b + 1], learn[b : b + 1])
            with torch.no_grad():
                expected, following = model.call(tokens[b : b + 1], alone, call)
            error = np.abs(outputs[bundle.manifest.output.name][b] - expected[0].numpy()).max()
            assert error < TOLERANCE, (entry.name, b)
            for state in bundle.manifest.state if learn[b] else ():
                own = following[state.name][0].numpy()
                error = np.abs(outputs[state.output][slot] - own).max()
                assert error < TOLERANCE * max(1, np.abs(own).max()), (entry.name, b, state.name)
        for state in bundle.manifest.state:
            for other in (1, 3):
                assert np.array_equal(outputs[state.output][other], pool[state.name][other].numpy()), state.name
