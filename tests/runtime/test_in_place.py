"""State in place: right with our kernel, and with nothing else."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from cli_tools import reseal
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from synthetic import tensor_offsets
from test_errors import FAILED, UNSUPPORTED, check, refuse
from tolerances import TOLERANCES
from variants import CONFIGS

import titans_runtime as rt
from titans_export.verifying import random_cuts

pytest_plugins = ["export_fixtures"]

TOLERANCE = TOLERANCES["cpu", "float32"]
CHUNK, PREFILL, VOCABULARY = 8, 24, 61
TOKENS = np.random.default_rng(11).integers(0, VOCABULARY, 200).astype(np.int32)
variants = pytest.mark.parametrize("variant", CONFIGS)
# With a memory in both layers, so that the first has changed when the second fails.
two_memories = pytest.mark.parametrize("variant", sorted(set(CONFIGS) - {"mac"}))


def open_with_kernel(path: Path) -> rt.Session:
    try:
        return rt.Session(path, threads=1, memory_kernel="require")
    except rt.Error as error:
        if "no such file" not in str(error):
            raise
    pytest.skip("the memory kernel is not built: make setup, with its headers in .deps")


def run_doubling_graph(state: npt.NDArray[np.float32], following: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """next = 2 state into `following`; y = next - state, which is the old state."""
    shape = [4]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["state", "state"], ["next"]),
            helper.make_node("Sub", ["next", "state"], ["y"]),
        ],
        "doubling",
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("y", "next")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = np.zeros(shape, np.float32)
    binding = session.io_binding()
    binding.bind_input("state", "cpu", 0, np.float32, shape, state.ctypes.data)
    for name, array in (("y", y), ("next", following)):
        binding.bind_output(name, "cpu", 0, np.float32, shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return y


def test_why_standard_operators_need_two_buffers() -> None:
    """ONNX Runtime takes one buffer for both without a word, and reads from it what it has already overwritten."""
    old = np.arange(1, 5, dtype=np.float32)
    state, following = old.copy(), np.zeros(4, np.float32)
    np.testing.assert_array_equal(run_doubling_graph(state, following), old)
    np.testing.assert_array_equal(following, 2 * old)
    np.testing.assert_array_equal(state, old)
    shared = old.copy()
    assert not np.array_equal(run_doubling_graph(shared, shared), old)


@variants
def test_what_is_in_place_is_so_with_the_kernel_alone(bundles: dict[str, Path], variant: str) -> None:
    """Memories, caches and the last inputs of convolutions: an operator with slots owns each."""
    manifest = json.loads((bundles[variant] / "manifest.json").read_text())
    wanted = [state["name"] for state in manifest["state"]]
    with open_with_kernel(bundles[variant]) as kernel, rt.Session(bundles[variant], memory_kernel="off") as standard:
        in_place = [state for state in kernel.info["state"] if state["in_place"]]
        assert [state["name"] for state in in_place] == wanted
        assert not any(state["in_place"] for state in standard.info["state"])
        memories = [state for state in in_place if state["role"] == "memory"]
        assert len(memories) == sum(map(CONFIGS[variant].has_memory, range(CONFIGS[variant].layers)))
        caches = [state for state in in_place if state["role"] == "cache"]
        assert len(caches) == (0 if variant == "lmm" else 2 * CONFIGS[variant].layers)
        saved = standard.stream().state_bytes - kernel.stream().state_bytes
        assert saved == sum(4 * np.prod(state["shape"]) for state in in_place)


def feed_whole(stream: rt.Stream) -> Iterator[Any]:
    yield stream.feed(TOKENS)


def feed_steps(stream: rt.Stream) -> Iterator[Any]:
    yield from (stream.step(int(token))[None] for token in TOKENS)


def feed_cuts(stream: rt.Stream) -> Iterator[Any]:
    yield from map(stream.feed, random_cuts(TOKENS, PREFILL, np.random.default_rng(3)))


def feed_frozen_for_a_while(stream: rt.Stream) -> Iterator[Any]:
    yield stream.feed(TOKENS[:43])
    stream.freeze()
    yield stream.feed(TOKENS[43:90])
    stream.resume()
    yield stream.feed(TOKENS[90:])


@variants
@pytest.mark.parametrize("feed", [feed_whole, feed_steps, feed_cuts, feed_frozen_for_a_while])
def test_the_kernel_computes_what_standard_operators_compute(
    bundles: dict[str, Path], variant: str, feed: Callable[[rt.Stream], Iterator[Any]]
) -> None:
    with open_with_kernel(bundles[variant]) as session:
        assert session.info["memory_kernel"].startswith("cpu-")
    logits, memory = {}, {}
    for choice in ("off", "require", "auto"):
        with rt.Session(bundles[variant], threads=1, memory_kernel=choice) as session:
            stream = session.stream()
            logits[choice], memory[choice] = np.concatenate(list(feed(stream))), stream.memory()
    np.testing.assert_array_equal(logits["auto"], logits["require"])
    np.testing.assert_allclose(logits["require"], logits["off"], rtol=0, atol=TOLERANCE)
    for name, value in memory["off"].items():
        if name.split(".")[-1][0] in "WS":
            np.testing.assert_allclose(memory["require"][name], value, rtol=0, atol=TOLERANCE)


@variants
def test_streams_share_nothing(bundles: dict[str, Path], variant: str) -> None:
    """Forks, resets and threads, where every stream writes into what it reads."""
    with open_with_kernel(bundles[variant]) as session:
        expected = session.stream().feed(TOKENS)
        stream = session.stream()
        stream.feed(TOKENS[:45], outputs="none")
        twin = stream.fork()
        twin.feed(TOKENS[:60], outputs="none")
        rows: dict[int, Any] = {}

        def work(index: int) -> None:
            mine = session.stream()
            rows[index] = np.concatenate([mine.feed(TOKENS[:50]), mine.feed(TOKENS[50:])])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        np.testing.assert_allclose(stream.feed(TOKENS[45:]), expected[45:], rtol=0, atol=TOLERANCE)
        twin.reset()
        np.testing.assert_array_equal(twin.feed(TOKENS), expected)
        for thread in threads:
            thread.join()
        for index in range(3):
            np.testing.assert_allclose(rows[index], expected, rtol=0, atol=TOLERANCE)


def edit_graph(bundle: Path, name: str, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, bundle / f"{name}.onnx")
    reseal(bundle)


def spoil_second_gates(graph: onnx.GraphProto) -> None:
    """NaN gates in the second layer, which the kernel refuses when the first has been updated."""
    bias = next(t for t in graph.initializer if t.name.endswith("layers.1.memory.gates.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(bias), np.nan), bias.name))


def memory_of(stream: rt.Stream) -> dict[str, Any]:
    """All of the memory that counts: of the open chunk's rows those up to its fill."""
    fill = stream.position % CHUNK
    return {
        name: value[..., :fill, :] if name.split(".")[-1].startswith(("layer_input", "output_grad")) else value
        for name, value in stream.memory().items()
    }


@two_memories
@pytest.mark.parametrize(
    ("broken", "before", "tokens"),
    [
        ("decode", 2 * PREFILL, 1),
        ("decode", PREFILL, CHUNK + 1),
        ("chunk", PREFILL + 3, 2 * CHUNK),
        ("prefill", 5, 2 * PREFILL),
    ],
    ids=["token", "chunk-then-token", "tokens-then-chunk", "many-then-prefill"],
)
def test_a_failure_midway_leaves_the_stream_as_it_was(
    bundles: dict[str, Path], tmp_path: Path, variant: str, broken: str, before: int, tokens: int
) -> None:
    path = Path(shutil.copytree(bundles[variant], tmp_path / "spoilt.titans"))
    edit_graph(path, broken, spoil_second_gates)
    with open_with_kernel(path) as session:
        stream = session.stream()
        stream.feed(TOKENS[:before], outputs="none")
        kept, twin = memory_of(stream), stream.fork()
        for _ in range(2):
            with pytest.raises(rt.Error) as caught:
                stream.feed(TOKENS[before : before + tokens])
            check(caught.value, FAILED, "NeuralMemory", "finite")
            assert stream.position == before
            now = memory_of(stream)
            assert now.keys() == kept.keys()
            for name, value in kept.items():
                np.testing.assert_array_equal(now[name], value, name)
        # On through the graphs that work.
        rest = TOKENS[before:][: 2 * CHUNK if broken == "decode" else 3]
        np.testing.assert_array_equal(stream.feed(rest), twin.feed(rest))


@pytest.mark.parametrize("cuts", [[1], [5, 1], [CHUNK], [3, CHUNK, 1], [40], [2 * PREFILL + 5]], ids=str)
def test_a_failure_leaves_mac_caches_as_they_were(bundles: dict[str, Path], tmp_path: Path, cuts: list[int]) -> None:
    """A token whose embedding is NaN: attention's caches have its rows when the memory refuses its gates. Rows that
    nothing should look at would do harm too, as NaN times nought is NaN.
    """
    bad = 7
    path = Path(shutil.copytree(bundles["mac"], tmp_path / "spoilt.titans"))
    tensors = load_file(path / "weights.safetensors")
    tensors["model.embedding"][bad] = np.nan
    offset, _ = tensor_offsets(path / "weights.safetensors")["model.embedding"]
    with (path / "weights.safetensors").open("r+b") as file:
        file.seek(offset)
        file.write(tensors["model.embedding"].tobytes())
    reseal(path)
    good = np.where(bad == TOKENS, bad + 1, TOKENS)
    with open_with_kernel(path) as session:
        for start in (0, 5, 2 * CHUNK, 31, 4 * CHUNK):
            stream = session.stream()
            stream.feed(good[:start], outputs="none")
            twin = stream.fork()
            for count in cuts:
                spoilt = good[start : start + count].copy()
                spoilt[-1] = bad
                with pytest.raises(rt.Error) as caught:
                    stream.feed(spoilt)
                check(caught.value, FAILED, "NeuralMemory", "finite")
                rest = good[start : start + 50]
                np.testing.assert_array_equal(stream.fork().feed(rest), twin.fork().feed(rest))


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_an_attribute_that_the_kernel_does_not_know(bundles: dict[str, Path], tmp_path: Path, name: str) -> None:
    open_with_kernel(bundles["mag"]).close()

    def add_attribute(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "NeuralMemory")
        node.attribute.append(helper.make_attribute("of_a_newer_version", 5))

    path = Path(shutil.copytree(bundles["mag"], tmp_path / "newer.titans"))
    edit_graph(path, name, add_attribute)
    for choice in ("auto", "require"):
        refuse(path, UNSUPPORTED, f"{name}.onnx", "NeuralMemory", "of_a_newer_version", memory_kernel=choice)
    rt.Session(path, memory_kernel="off").close()


def test_a_second_reader_takes_the_memory_out_of_place(bundles: dict[str, Path], tmp_path: Path) -> None:
    """One graph in which the old state is read by a node that nothing puts before the update."""
    open_with_kernel(bundles["lmm"]).close()

    def read_late(graph: onnx.GraphProto) -> None:
        update = next(node for node in graph.node if node.op_type == "NeuralMemory")
        late = "late"
        graph.node.append(helper.make_node("ReduceMax", [update.input[0]], [late], keepdims=0))
        for node in graph.node:
            if "logits" in node.output:
                node.output[list(node.output).index("logits")] = "plain"
        graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "little"))
        graph.node.append(helper.make_node("Mul", [late, "little"], ["shift"]))
        graph.node.append(helper.make_node("Add", ["plain", "shift"], ["logits"]))

    path = Path(shutil.copytree(bundles["lmm"], tmp_path / "late.titans"))
    edit_graph(path, "chunk", read_late)
    logits = {}
    for choice in ("off", "require"):
        with rt.Session(path, threads=1, memory_kernel=choice) as session:
            first, second = (state for state in session.info["state"] if state["role"] == "memory")
            assert not first["in_place"]
            assert second["in_place"] is (choice == "require")
            logits[choice] = session.stream().feed(TOKENS)
    np.testing.assert_allclose(logits["require"], logits["off"], rtol=0, atol=TOLERANCE)
