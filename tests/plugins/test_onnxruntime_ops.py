"""The library of custom operators in ONNX Runtime: what reaches the kernel, and what it says of what it refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from cases import KINDS, Case, kinds, worst
from onnx import TensorProto
from onnx_ops import LIBRARY, Arrays, make_case, make_feeds, make_model, make_session
from oracles import network, titans_stream
from tolerances import TOLERANCES

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes, initial_rows, memory_layout, neural_memory_update

TOLERANCE = TOLERANCES["cpu-kernel", "float32"]


@kinds
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "any"])
def test_a_node_computes_the_recurrence(spec: MemorySpec, aligned: bool) -> None:
    case = make_case(spec, 16 if aligned else 19)
    feeds = make_feeds(case, aligned)
    y, state, stats = make_session(make_model(feeds, attributes(spec, "update", aligned))).run(None, feeds)
    fields = memory_layout(spec).unpack(torch.from_numpy(state).double())
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
            expected, w, _, loss = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
            assert worst((torch.from_numpy(y[b, h]).double(), expected)) < TOLERANCE
            assert stats[b, h, 0] == pytest.approx(loss.sum().item(), rel=TOLERANCE)
            if aligned:
                assert worst((fields["W0"][b, h], w[0])) < TOLERANCE


@kinds
def test_a_node_reads(spec: MemorySpec) -> None:
    case = Case(spec, 5)
    feeds = {name: value for name, value in make_feeds(case).items() if name in ("state", "q", "norm_scale")}
    [y] = make_session(make_model(feeds, attributes(spec, "read", False))).run(None, feeds)
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            expected = network(spec, [x[b, h] for x in case.weights], case.q[b, h], scale)
            assert worst((torch.from_numpy(y[b, h]).double(), expected)) < TOLERANCE


def test_absent_and_optional_inputs_reach_the_kernel_in_their_places() -> None:
    """learn, valid, slots and update_limit, with holes between them, against the reference in float64."""
    spec = KINDS["mlp2-silu"]
    case = Case(spec, length=8, streams=2)
    pool = torch.randn(4, case.heads, memory_layout(spec).size, dtype=torch.float64)
    slots = torch.tensor([3, 1])
    pool[slots] = initial_rows(spec, case.weights)
    options: dict[str, torch.Tensor] = {
        "learn": torch.tensor([True, False]),
        "valid": torch.tensor([8, 5]),
        "slots": slots,
        "update_limit": torch.tensor([1e-3, 1e9]),
    }
    base = make_feeds(case) | {"state": pool.float().numpy()}
    for left_out in options:
        if left_out == "slots":
            continue
        given = {name: value for name, value in options.items() if name != left_out}
        feeds = base | {name: value.numpy() for name, value in given.items()}
        feeds = {n: (a.astype(np.float32) if a.dtype == np.float64 else a) for n, a in feeds.items()}
        y, state, stats = make_session(make_model(feeds, attributes(spec, "update", False))).run(None, feeds)
        inputs = (case.q, case.k, case.v, *case.gates)
        expected = neural_memory_update(spec, pool, *inputs, fill=torch.zeros(2, dtype=torch.int64), **given)
        valid = given.get("valid", torch.tensor([8, 8])).tolist()
        for b, n in enumerate(valid):
            assert worst((torch.from_numpy(y[b, :, :n]).double(), expected.y[b, :, :n])) < TOLERANCE, left_out
        assert worst((torch.from_numpy(stats).double(), expected.stats)) < TOLERANCE, left_out
        untouched = [0, 2]
        assert np.array_equal(state[untouched], base["state"][untouched])


def _bind(session: onnxruntime.InferenceSession, feeds: Arrays, state: int, state_out: int) -> onnxruntime.IOBinding:
    """Everything bound, the state and its successor to these addresses."""
    binding = session.io_binding()
    for name, array in feeds.items():
        if name != "state":
            binding.bind_cpu_input(name, array)
    shape = feeds["state"].shape
    binding.bind_input("state", "cpu", 0, np.float32, shape, state)
    binding.bind_output("y")
    binding.bind_output("state_out", "cpu", 0, np.float32, shape, state_out)
    binding.bind_output("stats")
    return binding


@pytest.mark.parametrize("nodes", [1, 3])
def test_one_buffer_for_the_state_gives_what_two_give(nodes: int) -> None:
    spec = KINDS["mlp3-silu"]
    feeds = make_feeds(Case(spec, 16), aligned=True)
    session = make_session(make_model(feeds, attributes(spec, "update", True), nodes))
    y, two, _ = session.run(["y", "state_out", "stats"], feeds)
    one = feeds["state"].copy()
    binding = _bind(session, feeds, one.ctypes.data, one.ctypes.data)
    session.run_with_iobinding(binding)
    assert np.array_equal(one, two)
    assert np.array_equal(binding.get_outputs()[0].numpy(), y)
    session.run_with_iobinding(binding)  # goes on from there
    assert np.array_equal(one, session.run(["state_out"], feeds | {"state": two})[0])


def test_buffers_reach_the_kernel_as_they_are_bound_and_wrong_ones_are_refused() -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    session = make_session(make_model(feeds, attributes(spec, "update", False)))
    memory = np.concatenate([feeds["state"].ravel(), np.zeros(64, np.float32)])
    before, start = memory.copy(), memory.ctypes.data
    for state, state_out, words in (
        (start, start + 4, r"overlapping buffers: state_out and state\. Fix: bind one buffer to both"),
        (start, start + memory.nbytes // 2 // 64 * 64, "overlapping buffers: state_out and state"),
        (start + 2, start + 2, "wrong memory layout of state: the address is not aligned to 4 bytes"),
    ):
        with pytest.raises(Exception, match=rf"\[NeuralMemory\] {words}"):
            session.run_with_iobinding(_bind(session, feeds, state, state_out))
        assert np.array_equal(memory, before)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fill", np.array([0, 8]), r"value out of range: fill of stream 1: expected \[0, 8\), got 8"),
        ("momentum", np.full((2, 3, 8), np.nan, np.float32), "gate not finite: momentum is -?nan at stream 0"),
        ("forget_gate", np.full((2, 3, 8), np.inf, np.float32), "gate not finite: forget_gate is inf"),
    ],
)
def test_wrong_values_are_refused_and_the_state_stays(name: str, value: npt.NDArray[Any], words: str) -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    session = make_session(make_model(feeds, attributes(spec, "update", False)))
    state = feeds["state"].copy()
    with pytest.raises(Exception, match=rf"\[NeuralMemory\] {words}.*\. Fix: "):
        session.run_with_iobinding(_bind(session, feeds | {name: value}, state.ctypes.data, state.ctypes.data))
    assert np.array_equal(state, feeds["state"])


def test_wrong_shapes_are_refused_at_run_time_too() -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    model = onnx.load_from_string(make_model(feeds, attributes(spec, "update", False)))
    for value in (*model.graph.input, *model.graph.output):
        for i, dimension in enumerate(value.type.tensor_type.shape.dim):
            dimension.dim_param = f"{value.name}_{i}"
    session = make_session(model.SerializeToString())
    session.run(None, feeds)
    for name, bad, words in (
        ("k", feeds["k"][..., :5], r"wrong shape of k: expected \(2, 3, 8, 6\), got \(2, 3, 8, 5\)"),
        ("state", feeds["state"][..., :-16], r"wrong shape of state: expected"),
        ("momentum", feeds["momentum"][:1], r"wrong shape of momentum: expected \(2, 3, 8\)"),
    ):
        with pytest.raises(Exception, match=rf"\[NeuralMemory\] {words}"):
            session.run(None, feeds | {name: np.ascontiguousarray(bad)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "write"}, 'invalid attribute mode: expected "update" or "read", got "write"'),
        ({"activation": "relu"}, 'invalid attribute activation: expected "silu" or "gelu", got "relu"'),
        ({"widths": [6, 10]}, "contradicting attributes: widths must begin and end with the same value"),
        (
            {"memory_dtype": "int4"},
            'attribute memory_dtype: expected "float32" or "bfloat16" or "float16" or "int8" or "fp8", got "int4"',
        ),
        ({"chunk_size": 0}, "invalid attribute chunk_size: expected"),
        ({"residual": 1.0}, "invalid attribute residual: wrong type"),
        ({"memory_dtype": 16}, "invalid attribute memory_dtype: wrong type"),
        ({"activation": None}, "missing attribute: activation"),
    ],
)
def test_wrong_attributes_are_refused_when_the_model_is_loaded(change: dict[str, Any], words: str) -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    node = attributes(spec, "update", False)
    if change.get("mode"):
        model = make_model(feeds, node).replace(b"update", b"writes")
        words = words.replace('"write"', '"writes"')
    else:
        model = make_model(feeds, {name: value for name, value in (node | change).items() if value is not None})
    with pytest.raises(Exception, match=rf"\[NeuralMemory\] .*{words}.*\. Fix: export"):
        make_session(model)


def test_a_type_that_the_operator_does_not_take_is_refused_when_the_model_is_loaded() -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    model = onnx.load_from_string(make_model(feeds, attributes(spec, "update", False)))
    [q] = [value for value in model.graph.input if value.name == "q"]
    q.type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match=r"Type Error.*tensor\(double\).*NeuralMemory"):
        make_session(model.SerializeToString())


def test_the_instruction_set_can_be_forced_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KINDS["mlp2-gelu"]
    feeds = make_feeds(Case(spec, 8))
    model = make_model(feeds, attributes(spec, "update", False))
    best = make_session(model).run(None, feeds)
    monkeypatch.setenv("TITANS_CPU_TARGET", "plain")
    plain = make_session(model).run(None, feeds)
    assert worst((torch.from_numpy(plain[0]), torch.from_numpy(best[0]))) < TOLERANCE
    assert not all(np.array_equal(a, b) for a, b in zip(plain, best, strict=True)), "both ran the same code"
    monkeypatch.setenv("TITANS_CPU_TARGET", "mmx")
    with pytest.raises(Exception, match=r"not supported on this processor: .*, got mmx"):
        make_session(model)


def test_threads_change_no_bit() -> None:
    spec = KINDS["mlp2-norm"]
    feeds = make_feeds(Case(spec, 40), aligned=True)
    model = make_model(feeds, attributes(spec, "update", True))
    one, *others = (make_session(model, threads).run(None, feeds) for threads in (1, 2, 3))
    assert all(np.array_equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_the_kernel_runs_on_the_session_threads_and_starts_none() -> None:
    """Many heads on a session of three threads: as many threads in the process after the calls as before."""
    spec = MemorySpec((32, 64, 32), chunk_size=16)
    feeds = make_feeds(Case(spec, 64, streams=2, heads=16), aligned=True)

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    none = threads()
    session = make_session(make_model(feeds, attributes(spec, "update", True)), threads=3)
    opened = threads()
    assert opened == none + 2, "the session's pool, beside the thread that calls"
    for _ in range(20):
        session.run(None, feeds)
        assert threads() == opened


def test_an_older_onnxruntime_is_refused_by_name() -> None:
    """RegisterCustomOps with the interface of a release that does not know ours."""
    get_api_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)

    class ApiBase(ctypes.Structure):
        _fields_ = [("get_api", get_api_type), ("get_version", get_version_type)]

    [path] = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1*")
    real = ctypes.CDLL(str(path))
    real.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
    api = real.OrtGetApiBase().contents.get_api(1)
    version = ctypes.create_string_buffer(b"1.16.3")
    old = ApiBase(
        get_api_type(lambda version: api if version <= 16 else None),
        get_version_type(lambda: ctypes.addressof(version)),
    )
    library = ctypes.CDLL(str(LIBRARY))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    status = library.RegisterCustomOps(None, ctypes.byref(old))
    # The interface's third function: the text of a status.
    get_message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(
        ctypes.cast(api, ctypes.POINTER(ctypes.c_void_p))[2]
    )
    text = get_message(status).decode()
    assert text.startswith("[NeuralMemory] not supported by this ONNX Runtime: expected 1.")
    assert "or newer, got 1.16.3. Fix: run pip install --upgrade onnxruntime" in text
