"""The graphs that compilers get, and which state tensors one buffer may serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_tools import bare_types, model_of, session, stream_logits, value
from manifests import state_tensor
from onnx import TensorProto, helper, numpy_helper
from tolerances import TOLERANCES

from titans_export.bundle import read_bundle
from titans_export.engines import graphs
from titans_export.engines.precision import PrecisionError, lower_precision
from titans_export.errors import BundleError
from titans_export.onnx.files import load_graph
from titans_export.onnx.graphs import SLOTS_INPUT
from titans_export.onnx.initializers import to_bfloat16
from titans_export.onnx.mapped import write_graph
from titans_export.onnx.nodes import attribute, attributes, is_memory
from titans_export.onnx.streams import fix_streams
from titans_export.operators import CHUNK_NEURAL_MEMORY, DOMAIN, NEURAL_MEMORY, Operator

pytest_plugins = ["export_fixtures"]
VARIANTS = ("mac", "mag", "mal", "lmm")
STREAM = 60  # tokens: two calls of prefill, one of chunk and four of decode
STATE = [state_tensor("m")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_plugin_graphs(bundles: dict[str, Path], variant: str) -> None:
    bundle = read_bundle(bundles[variant])
    for name, path in bundle.graph_paths().items():
        model = load_graph(path)
        state = [entry.input for entry in bundle.manifest.state if entry.role == "memory"]
        rewritten = graphs.with_plugin(model, graphs.DECLARED, state)
        assert not rewritten.functions
        before = [node for node in model.graph.node if is_memory(node)]
        after = [node for node in rewritten.graph.node if is_memory(node)]
        assert len(before) == len(after) > 0
        for old, new in zip(before, after, strict=True):
            said = attribute(new, "inputs").split(",")
            given = {operand: old.input[NEURAL_MEMORY.input_names.index(operand)] for operand in said}
            for operand, name_given in zip(said, new.input, strict=True):
                if operand != "learn":
                    assert name_given == given[operand]
                    continue
                # TensorRT gives plugins no bool.
                [cast] = [node for node in rewritten.graph.node if name_given in node.output]
                assert (cast.op_type, list(cast.input)) == ("Cast", [given[operand]])
                assert attribute(cast, "to") == onnx.TensorProto.INT64
            assert all(new.input)
            assert not new.overload
            update = attribute(old, "mode") == "update"
            # Nothing in a model reads the statistics.
            assert attribute(new, "outputs") == ("y,state_out" if update else "y")
            assert attribute(new, "alias") == (graphs.DECLARED if update else graphs.TWO_BUFFERS)
            assert ("fill" in said) == (update and name == "decode")
            for key, expected in NEURAL_MEMORY.complete(attributes(old)).items():
                assert attribute(new, key) == expected
        onnx.checker.check_model(rewritten)


@pytest.mark.parametrize("name", ["chunk", "decode"])
def test_a_fixed_graph_of_eight_streams_is_eight_of_one(bundles: dict[str, Path], name: str) -> None:
    """In standard operators, as TensorRT-RTX gets them. Streams differ in tokens, positions, learning and state."""
    bundle = read_bundle(bundles["mac"])
    (graph,) = [graph for graph in bundle.manifest.graphs if graph.name == name]
    random = np.random.default_rng(8)

    def run(streams: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        model = load_graph(bundle.path / graph.file)
        fix_streams(model, SLOTS_INPUT, streams)
        opened = session(graphs.inline(model))
        names = [output.name for output in opened.get_outputs()]
        return dict(zip(names, opened.run(names, feeds), strict=True))

    feeds = {
        "tokens": random.integers(0, bundle.manifest.output.size, (8, graph.tokens)),
        "position": graph.stride * random.permutation(8),
        "learn": np.arange(8) % 3 > 0,
    }
    for entry in bundle.manifest.state:
        first = bundle.initial_state()[entry.name]
        feeds[entry.input] = np.concatenate([first] * 8)
        feeds[entry.input] += 0.1 * random.standard_normal(feeds[entry.input].shape).astype(np.float32)
    together = run(8, feeds)
    for stream in range(8):
        alone = run(1, {key: values[stream : stream + 1] for key, values in feeds.items()})
        for key, values in alone.items():
            np.testing.assert_allclose(together[key][stream : stream + 1], values, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_memory_of_every_variant_may_be_in_place(bundles: dict[str, Path], variant: str) -> None:
    bundle = read_bundle(bundles[variant])
    models = [load_graph(path) for path in bundle.graph_paths().values()]
    memories = [entry.name for entry in bundle.manifest.state if entry.role == "memory"]
    assert graphs.in_place(models, bundle.manifest.state) == memories


def _memory(inputs: list[str], outputs: list[str], mode: str) -> onnx.NodeProto:
    return helper.make_node("NeuralMemory", inputs, outputs, domain="ai.titans", mode=mode)


UPDATE = _memory(["m", "q", "q", "q", "g", "g", "g"], ["y", "m.next"], "update")
READ_BEFORE = [_memory(["m", "p"], ["q"], "read"), UPDATE]
ORDERS = {
    "alone": ([helper.make_node("Identity", ["p"], ["q"]), UPDATE], True),
    "read before": (READ_BEFORE, True),
    "read by another operator": ([helper.make_node("Relu", ["m"], ["other"]), *READ_BEFORE], False),
    "read by nobody knows when": ([*READ_BEFORE, _memory(["m", "p"], ["z"], "read")], False),
    "a path through a shape proves no order": (
        [
            _memory(["m", "p"], ["z"], "read"),
            helper.make_node("Shape", ["z"], ["s"]),
            helper.make_node("Expand", ["p", "s"], ["q"]),
            UPDATE,
        ],
        False,
    ),
    "not straight to the output": (
        [READ_BEFORE[0], _memory(["m", *UPDATE.input[1:]], ["y", "n"], "update"),
         helper.make_node("Identity", ["n"], ["m.next"])],
        False,
    ),
    "another operator's": ([helper.make_node("Relu", ["m"], ["m.next"])], False),
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_who_reads_the_old_state(order: str) -> None:
    nodes, expected = ORDERS[order]
    state = value("m", (1, 1, 4))
    model = model_of(nodes, [state, value("p", (1,)), value("g", (1,))], [value("m.next", (1, 1, 4))])
    assert graphs.in_place([model], STATE) == (["m"] if expected else [])


def test_a_branch_that_reads_the_old_state() -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["m"], ["b"])], "b", [], [value("b", (1, 1, 4))])
    node = helper.make_node("If", ["c"], ["q"], then_branch=branch, else_branch=branch)
    inputs = [value("m", (1, 1, 4)), value("g", (1,)), value("c", (), TensorProto.BOOL)]
    model = model_of([node, UPDATE], inputs, [value("m.next", (1, 1, 4))])
    assert graphs.in_place([model], STATE) == []


@pytest.mark.parametrize("operator", [("Relux", ""), ("NeuralMemory", "ai.titans")])
def test_a_foreign_operator_is_named(operator: tuple[str, str]) -> None:
    """TensorRT-RTX takes it for a plugin, and that ends the process."""
    node = helper.make_node(operator[0], ["a"], ["b"], name="odd", domain=operator[1])
    with pytest.raises(BundleError, match=f"{operator[0]}.*'odd'"):
        graphs.inline(model_of([node], [value("a", (1,))], [value("b", (1,))]))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_products_are_lowered(bundles: dict[str, Path], variant: str, precision: str) -> None:
    low = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    for path in read_bundle(bundles[variant]).graph_paths().values():
        model = load_graph(path)
        lowered = lower_precision(model, precision, memory=False)
        assert [v.SerializeToString() for v in lowered.graph.input] == [
            v.SerializeToString() for v in model.graph.input
        ]
        assert [v.SerializeToString() for v in lowered.graph.output] == [
            v.SerializeToString() for v in model.graph.output
        ]
        types = bare_types(lowered)
        products = 0
        for node in lowered.graph.node:
            kinds = {types.get(name) for name in node.input if name in types}
            if node.op_type == "MatMul":
                products += 1
                assert kinds == {low}, node.name
            elif node.op_type != "Cast":
                assert low not in kinds, node.name
        assert products == sum(node.op_type == "MatMul" for node in model.graph.node) > 0
        assert not {t.name for t in lowered.graph.initializer if t.data_type == TensorProto.FLOAT} & {
            name for node in lowered.graph.node if node.op_type == "MatMul" for name in node.input
        }


def test_the_plugin_takes_the_low_type(bundles: dict[str, Path]) -> None:
    model = lower_precision(load_graph(read_bundle(bundles["mac"]).graph_paths()["decode"]), "bf16", memory=True)
    casts = {node.output[0]: attribute(node, "to") for node in model.graph.node if node.op_type == "Cast"}
    up = {node.input[0]: attribute(node, "to") for node in model.graph.node if node.op_type == "Cast"}
    memories = [node for node in model.graph.node if is_memory(node)]
    assert memories
    for node in memories:
        given = zip(NEURAL_MEMORY.input_names, node.input, strict=False)
        for name, value_name in ((operand, read) for operand, read in given if read):
            assert (casts.get(value_name) == TensorProto.BFLOAT16) == (name in ("q", "k", "v")), name
        assert up[node.output[0]] == TensorProto.FLOAT


def _two_memories() -> onnx.ModelProto:
    """A memory that kernels for GPUs cover, the state of which feeds one that they do not, both with functions."""

    def memory(overload: str, inputs: list[str], outputs: list[str], operator: Operator) -> onnx.NodeProto:
        given = {"mode": "update"} if operator is NEURAL_MEMORY else {}
        return helper.make_node(operator.name, inputs, outputs, domain=DOMAIN, overload=overload, **given)

    def body(name: str, overload: str, operator: str) -> onnx.FunctionProto:
        nodes = [helper.make_node(operator, ["q"], ["y"]), helper.make_node(operator, ["state"], ["state_out"])]
        opset = [helper.make_opsetid("", 20)]
        return helper.make_function(DOMAIN, name, ["state", "q"], ["y", "state_out"], nodes, opset, overload=overload)

    nodes = [
        memory("token", ["m", "q"], ["y", "m.next"], NEURAL_MEMORY),
        memory("chunk", ["n", "y"], ["z", "n.next"], CHUNK_NEURAL_MEMORY),
        helper.make_node("Mix", ["z", "y"], ["out", "unused"], domain=DOMAIN),
    ]
    shapes = [value(name, (1, 2)) for name in ("m", "n", "q")]
    model = model_of(nodes, shapes, [value(name, (1, 2)) for name in ("out", "m.next", "n.next")])
    model.functions.extend(
        [
            body(NEURAL_MEMORY.name, "token", "Neg"),
            body(CHUNK_NEURAL_MEMORY.name, "chunk", "Exp"),
            body("Mix", "", "Abs"),
        ]
    )
    return model


def test_memories_without_a_gpu_kernel_are_written_out() -> None:
    model = _two_memories()
    kept = graphs.with_kernels(model)
    assert [graphs.has_kernel(node) for node in model.graph.node] == [True, False, False]
    assert [node.op_type for node in kept.graph.node] == [NEURAL_MEMORY.name, "Exp", "Exp", "Abs", "Abs"]
    assert [function.overload for function in kept.functions] == ["token"]
    plugin = graphs.with_plugin(model, graphs.DECLARED, ["m"])
    [node] = [node for node in plugin.graph.node if node.domain]
    assert node.op_type == NEURAL_MEMORY.name
    assert not plugin.functions
    states = [state_tensor(name) for name in ("m", "n")]
    assert graphs.in_place([model], states) == ["m"]
    given = {name: np.array([[1, 2]], np.float32) for name in ("m", "n", "q")}
    for one, other in zip(session(model).run(None, given), session(kept).run(None, given), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_written_out_stays_float32(precision: str) -> None:
    lowered = lower_precision(_two_memories(), precision, memory=True)
    casts = [node.output[0] for node in lowered.graph.node if node.op_type == "Cast"]
    [token, chunk] = [node for node in lowered.graph.node if is_memory(node)]
    assert token.input[1] in casts
    assert chunk.input[1] == "y" and not chunk.output[0].endswith(precision)


def _emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """bfloat16 products in float32, as ONNX Runtime has none for the CPU: the same roundings on the way in and out."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = []
    for node in result.graph.node:
        if node.op_type != "MatMul":
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            node.input[i] = f"{name}.up{len(nodes)}"
            nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT))
        name, node.output[0] = node.output[0], f"{node.output[0]}.up"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [name], to=TensorProto.BFLOAT16)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_how_far_low_products_move_logits(bundles: dict[str, Path], variant: str, precision: str) -> None:
    bundle = read_bundle(bundles[variant])
    sessions = {}
    for name, path in bundle.graph_paths().items():
        lowered = lower_precision(load_graph(path), precision, memory=False)
        sessions[name] = session(_emulated(lowered) if precision == "bf16" else lowered)
    logits, state = stream_logits(bundle, sessions, STREAM)
    golden = bundle.golden().values[:STREAM]
    error = float(np.abs(logits - golden).max())
    assert error <= TOLERANCES["products", precision] * float(np.abs(golden).max())
    assert error > bundle.tolerance, "nothing was lowered"
    assert all(tensor.dtype == np.float32 for tensor in state.values())


def test_weights_that_do_not_fit() -> None:
    weight = numpy_helper.from_array(np.array([[7e4]], np.float32), "w")
    model = model_of(
        [helper.make_node("MatMul", ["a", "w"], ["b"])], [value("a", (1, 1))], [value("b", (1, 1))], (weight,)
    )
    with pytest.raises(PrecisionError, match=r"weights in w: .*70000.*give --precision bf16"):
        lower_precision(model, "fp16", memory=False)
    lowered = lower_precision(model, "bf16", memory=False)
    assert [tensor.data_type for tensor in lowered.graph.initializer] == [TensorProto.BFLOAT16]


def test_bfloat16_is_the_nearest() -> None:
    import torch

    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-30, 30, 4096)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32)
    both = torch.cat([values, ties])
    expected = both.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(both.numpy()), expected)


def test_a_weight_that_others_read_stays(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["a", "w"], ["b"]), helper.make_node("Add", ["b", "w"], ["c"])]
    model = model_of(nodes, [value("a", (2, 2))], [value("c", (2, 2))], (weight,))
    lowered = lower_precision(model, "fp16", memory=False)
    assert {t.name: t.data_type for t in lowered.graph.initializer} == {
        "w": TensorProto.FLOAT, "w.fp16": TensorProto.FLOAT16,
    }  # fmt: skip
    given = np.array([[1, 2], [3, 4]], np.float32)
    (got,) = session(lowered).run(None, {"a": given})
    np.testing.assert_array_equal(got, given + np.eye(2))
    path = write_graph(lowered, tmp_path / "g.onnx")
    (again,) = session(path).run(None, {"a": given})
    np.testing.assert_array_equal(again, got)
