"""ai.titans::CausalConvolution on the CPU: the kernel in ONNX Runtime against float64, row by row."""

from __future__ import annotations

import ctypes

import numpy as np
import onnxruntime
import pytest
from attention_oracle import Array, causal_convolution
from onnx import TensorProto, helper
from onnx_ops import LIBRARY, make_session
from tolerances import TOLERANCES

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernel is not built: make setup")

TOLERANCE = TOLERANCES["cpu-kernel", "float32"]
INPUTS = ("past", "x", "weight", "bias", "valid", "slots")


def make_feeds(
    rows: int,
    channels: int,
    tokens: int,
    streams: int = 1,
    bias: bool = True,
    valid: tuple[int, ...] | None = None,
    slots: tuple[int, ...] | None = None,
) -> dict[str, Array]:
    draw = np.random.default_rng(rows * 1000 + channels)
    pool = 6 if slots else streams
    shapes = {"past": (pool, rows - 1, channels), "x": (streams, tokens, channels), "weight": (rows, channels)}
    shapes |= {"bias": (channels,)} if bias else {}
    feeds: dict[str, Array] = {n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if valid is not None:
        feeds["valid"] = np.array(valid)
        for b, count in enumerate(valid):  # padding has arbitrary values
            feeds["x"][b, count:] = np.nan
    if slots is not None:
        feeds["slots"] = np.array(slots)
    return feeds


def make_node_model(feeds: dict[str, Array], fixed: bool = True, **attributes: str) -> bytes:
    names = [name if name in feeds else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    node = helper.make_node("CausalConvolution", names, ["y", "past_out"], domain="ai.titans", **attributes)
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    values = [helper.make_tensor_value_info(n, kinds[x.dtype], x.shape if fixed else None) for n, x in feeds.items()]
    shapes = {"y": feeds["x"].shape, "past_out": feeds["past"].shape}
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s if fixed else None) for n, s in shapes.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.titans", 1)]
    graph = helper.make_graph([node], "one", values, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def run(feeds: dict[str, Array], threads: int = 2, **attributes: str) -> list[Array]:
    return make_session(make_node_model(feeds, **attributes), threads).run(None, feeds)


CASES = {
    "decode": make_feeds(4, 128, 1, 3),
    "two-rows": make_feeds(2, 33, 9, 2),
    "three-rows": make_feeds(3, 7, 9, 2, bias=False),
    "five-rows": make_feeds(5, 70, 9, 2),
    "nine-rows": make_feeds(9, 16, 4, 2, bias=False),
    "prefill": make_feeds(4, 384, 64),
    "one-channel": make_feeds(4, 1, 64),
    "no-tokens": make_feeds(4, 20, 0, 2),
    "no-streams": make_feeds(4, 20, 3, 0),
    "padding": make_feeds(4, 100, 6, 5, valid=(0, 1, 2, 5, 6)),
    "padding-of-five-rows": make_feeds(6, 100, 6, 5, valid=(0, 1, 2, 5, 6)),
    "slots": make_feeds(4, 65, 3, 3, valid=(3, 0, 1), slots=(4, 0, 2)),
}


@pytest.mark.parametrize("target", ["avx512", "avx2", "neon", "plain"])
@pytest.mark.parametrize("feeds", CASES.values(), ids=CASES)
def test_against_float64(feeds: dict[str, Array], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_CPU_TARGET", target)
    ask = ctypes.CDLL(str(LIBRARY)).titans_onnxruntime_ops_target
    ask.restype = ctypes.c_char_p
    if ask() is None:
        pytest.skip(f"no {target} on this machine")
    for activation in ("none", "silu"):
        outputs = zip(run(feeds, activation=activation), causal_convolution(feeds, activation), strict=True)
        for a, b in outputs:
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 30])
def test_batches_and_threads_change_no_bit(tokens: int) -> None:
    feeds = make_feeds(4, 384, tokens, 3, valid=(tokens, 0, tokens), slots=(4, 0, 2))
    y, past = run(feeds)
    for threads in (1, 3):
        for a, b in zip(run(feeds, threads), (y, past), strict=True):
            np.testing.assert_array_equal(a, b)
    for stream, slot in enumerate(feeds["slots"]):
        alone = {n: x[stream : stream + 1] for n, x in feeds.items() if n in ("x", "valid")}
        alone |= {n: feeds[n] for n in ("weight", "bias")} | {"past": feeds["past"][slot : slot + 1]}
        found = run(alone)
        np.testing.assert_array_equal(found[0][0], y[stream])
        np.testing.assert_array_equal(found[1][0], past[slot])
    for unused in (1, 3, 5):
        np.testing.assert_array_equal(past[unused], feeds["past"][unused])


def bind_in_place(feeds: dict[str, Array]) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding, Array, Array]:
    session = make_session(make_node_model(feeds))
    binding = session.io_binding()
    past = onnxruntime.OrtValue.ortvalue_from_numpy(feeds["past"].copy())
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.full_like(feeds["x"], 7))
    for name, array in feeds.items():
        if name != "past":
            binding.bind_cpu_input(name, array)
    binding.bind_ortvalue_input("past", past)
    binding.bind_ortvalue_output("past_out", past)
    binding.bind_ortvalue_output("y", y)
    return session, binding, past, y


@pytest.mark.parametrize("rows", [4, 6])
def test_in_one_buffer(rows: int) -> None:
    feeds = make_feeds(rows, 100, 6, 5, valid=(0, 1, 2, 5, 6))
    session, binding, past, y = bind_in_place(feeds)
    session.run_with_iobinding(binding)
    for a, b in zip((y.numpy(), past.numpy()), run(feeds), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"valid": [2, 4]}, r"valid of stream 1: expected \[0, 4\), got 4"),
        ({"valid": [-1, 2]}, r"valid of stream 0: expected \[0, 4\), got -1"),
        ({"slots": [0, 2]}, r"slots of stream 1: expected \[0, 2\), got 2"),
        ({"slots": [0, 0]}, "slots has 0 twice"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, list[int]], words: str) -> None:
    """And nothing is written."""
    feeds = make_feeds(4, 8, 3, 2) | {name: np.array(values) for name, values in change.items()}
    session, binding, past, y = bind_in_place(feeds)
    with pytest.raises(Exception, match=rf"\[CausalConvolution\] value out of range: {words}\. Fix: "):
        session.run_with_iobinding(binding)
    assert np.array_equal(past.numpy(), feeds["past"])
    assert (y.numpy() == 7).all()


def test_saturated_silu_is_finite() -> None:
    """At inputs whose exponential overflows float32."""
    feeds = make_feeds(2, 4, 1) | {"x": np.float32([[[-1e4, 1e4, -80, 80]]]), "bias": np.zeros(4, np.float32)}
    feeds |= {"past": np.zeros((1, 1, 4), np.float32), "weight": np.ones((2, 4), np.float32)}
    y = run(feeds, activation="silu")[0]
    np.testing.assert_allclose(y, causal_convolution(feeds, "silu")[0], rtol=1e-6, atol=1e-30)


def test_an_unknown_activation_is_refused() -> None:
    words = r'\[CausalConvolution\] invalid attribute activation: expected "none" or "silu", got "gelu"\. Fix: '
    with pytest.raises(Exception, match=words):
        run(make_feeds(4, 8, 3, 2), activation="gelu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"past": (2, 24)}, "wrong rank of past: expected 3, got 2"),
        ({"x": (2, 3, 1, 8)}, "wrong rank of x: expected 3, got 4"),
        ({"weight": (4, 8, 1)}, "wrong rank of weight: expected 2, got 3"),
        ({"weight": (1, 8)}, "wrong shape of weight: expected at least 2 rows, got 1"),
        ({"weight": (4, 9)}, r"wrong shape of weight: expected \(4, 8\), got \(4, 9\)"),
        ({"past": (2, 4, 8)}, r"wrong shape of past: expected \(2, 3, 8\), got \(2, 4, 8\)"),
        ({"past": (3, 3, 8)}, r"wrong shape of past: expected \(2, 3, 8\), got \(3, 3, 8\)"),
        ({"bias": (9,)}, r"wrong shape of bias: expected \(8\), got \(9\)"),
        ({"valid": (3,)}, r"wrong shape of valid: expected \(2\), got \(3\)"),
        ({"slots": (3,)}, r"wrong shape of slots: expected \(2\), got \(3\)"),
    ],
)
def test_wrong_operands_are_refused(change: dict[str, tuple[int, ...]], words: str) -> None:
    feeds = make_feeds(4, 8, 3, 2)
    for name, shape in change.items():
        feeds[name] = np.zeros(shape, np.int64 if name in ("valid", "slots") else np.float32)
    session = make_session(make_node_model(feeds, fixed=False))
    with pytest.raises(Exception, match=rf"\[CausalConvolution\] {words}\. Fix: "):
        session.run(None, feeds)
