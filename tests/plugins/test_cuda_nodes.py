"""The CUDA kernels of CachedAttention, CausalConvolution and HyperConnection: the CPU kernels' table against float64.

On a GPU where there is one, and emulated. Random orders of threads must change no bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_oracle import Array, cached_attention, causal_convolution
from kernel_runner import Target
from node_runner import emulated, emulated_node, node_targets, run_cuda_node
from test_cached_attention import CASES as ATTENTION
from test_cached_attention import RIGHT, SHARED, Case, rows_of, worst
from test_causal_convolution import CASES as CONVOLUTION
from test_causal_convolution import make_feeds
from test_hyper_connection import Case as Connection
from tolerances import TOLERANCES

TOLERANCE = TOLERANCES["cuda-kernel", "float32"]
ORDERS = ("forward", "reverse", "1", "2", "3")
targets = pytest.mark.parametrize("target", node_targets())


def attend(target: Target, folder: Path, case: Case, feeds: dict[str, Array], in_place: bool = False) -> list[Array]:
    shapes = [feeds[name].shape for name in ("q", "keys", "values")]
    outputs, status = run_cuda_node(target, folder, "CachedAttention", case.attributes, feeds, shapes, in_place)
    assert status == ""
    return outputs


def convolve(
    target: Target, folder: Path, feeds: dict[str, Array], in_place: bool = False, activation: str = "none"
) -> list[Array]:
    shapes = [feeds["x"].shape, feeds["past"].shape]
    node = {"activation": activation}
    outputs, status = run_cuda_node(target, folder, "CausalConvolution", node, feeds, shapes, in_place)
    assert status == ""
    return outputs


def connect(target: Target, folder: Path, case: Connection) -> list[Array]:
    feeds = {name: x.float().numpy() for name, x in case.operands().items()}
    batch, tokens, streams, width = feeds["residuals"].shape
    shapes = [(batch, tokens, width), (batch, tokens, streams, width), (batch, tokens, streams)]
    node = {"iterations": case.iterations}
    return run_cuda_node(target, folder, "HyperConnection", node, feeds, shapes if case.beta else shapes[:2])[0]


@pytest.mark.sample(3)
@targets
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention_against_float64(case: Case, target: Target, tmp_path: Path) -> None:
    feeds = case.feeds()
    expected = cached_attention(feeds, **case.attributes)
    for a, b in zip(attend(target, tmp_path, case, feeds), expected, strict=True):
        assert worst(a, b) < TOLERANCE  # NaN fails too


@pytest.mark.sample(3)
@targets
@pytest.mark.parametrize("feeds", CONVOLUTION.values(), ids=CONVOLUTION)
def test_convolution_against_float64(feeds: dict[str, Array], target: Target, tmp_path: Path) -> None:
    for activation in ("none", "silu"):
        found = convolve(target, tmp_path, feeds, activation=activation)
        for a, b in zip(found, causal_convolution(feeds, activation), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


CONNECTIONS = {
    "one": Connection(1, 8),
    "four": Connection(4, 100, tokens=9),
    "no-branch": Connection(4, 33, branch=False),
    "no-beta": Connection(3, 64, beta=False),
    "sixteen": Connection(16, 300, tokens=2),
    "one-iteration": Connection(5, 40, iterations=1),
    "no-tokens": Connection(2, 8, tokens=0),
}


@targets
@pytest.mark.parametrize("case", CONNECTIONS.values(), ids=CONNECTIONS)
def test_connection_against_titans_pytorch(case: Connection, target: Target, tmp_path: Path) -> None:
    for a, b in zip(connect(target, tmp_path, case), case.expected(), strict=True):
        assert worst(a, b.numpy()) < TOLERANCE


@emulated
def test_random_orders_and_buffers_change_no_bit(tmp_path: Path) -> None:
    """What one thread does before another between two barriers must not matter: it would be a race on a GPU."""
    names = ("decode-mac", "window-and-segment", "padding", "slots", "slots-decode", "segment-in-window", "width-6")
    attention = [(ATTENTION[name], ATTENTION[name].feeds()) for name in names]
    convolution = [CONVOLUTION[name] for name in ("padding", "padding-of-five-rows", "slots")]
    first: list[Array] = []
    for order in ORDERS:
        target = emulated_node(order)
        found: list[Array] = []
        for case, feeds in attention:
            found += attend(target, tmp_path, case, feeds, in_place=order != "forward")
        for feeds in convolution:
            found += convolve(target, tmp_path, feeds, in_place=order != "forward")
        found += connect(target, tmp_path, CONNECTIONS["sixteen"])
        first = first or found
        assert all(np.array_equal(a, b) for a, b in zip(first, found, strict=True)), order


@emulated
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_a_stream_is_the_same_alone(name: str, tmp_path: Path) -> None:
    case, target = SHARED[name], emulated_node("7")
    feeds = case.feeds()
    y, keys, values = attend(target, tmp_path, case, feeds)
    slots = case.slots or ()
    for stream, slot in enumerate(slots):
        alone, own = rows_of(case, feeds, stream)
        for a, b in zip(attend(target, tmp_path, alone, own), (y[stream], keys[slot], values[slot]), strict=True):
            np.testing.assert_array_equal(a[0], b)
    for unused in set(range(keys.shape[0])) - set(slots):
        np.testing.assert_array_equal(keys[unused], feeds["keys"][unused])
        np.testing.assert_array_equal(values[unused], feeds["values"][unused])


@emulated
@pytest.mark.parametrize("tokens", [1, 40])
def test_hidden_rows_and_bad_rows_reach_no_other_query(tokens: int, tmp_path: Path) -> None:
    """Rows that no query sees hold NaN, and a bad row of the call reaches only the queries that see it."""
    case, target = Case(window=9, ring=30, tokens=tokens, positions=(100, 3)), emulated_node("3")
    feeds = case.feeds()
    expected = cached_attention(feeds, **case.attributes)
    for b, position in enumerate(case.positions):
        seen = {row % 30 for row in range(max(0, position - 8), position)}
        for name in ("keys", "values"):
            feeds[name][b][:, sorted(set(range(30)) - seen)] = np.nan
    assert worst(attend(target, tmp_path, case, feeds)[0], expected[0]) < TOLERANCE
    if tokens == 1:
        return
    for bad in (np.nan, np.inf):
        feeds["v"][0, 20, 3] = bad
        y = attend(target, tmp_path, case, feeds)[0]
        assert not np.isfinite(y[0, 20:29, 3]).any()
        y[0, 20:29, 3] = expected[0][0, 20:29, 3]
        assert worst(y, expected[0]) < TOLERANCE


BAD: list[tuple[str, dict[str, Any]]] = [
    ("position", {"position": [0, -1]}),
    ("position", {"position": [3, 2**63 - 4]}),
    ("increments", {"increments": [0] * 7 + [2**32]}),
    ("valid", {"valid": [4, 5]}),
    ("slots", {"slots": [0, 2]}),
    ("slots", {"slots": [1, 1]}),
]


@targets
@pytest.mark.parametrize(("operand", "change"), BAD)
def test_a_stream_with_bad_values_is_left_alone(
    operand: str, change: dict[str, Any], target: Target, tmp_path: Path
) -> None:
    feeds = RIGHT.feeds()
    good = attend(target, tmp_path, RIGHT, feeds)
    bad = feeds | {name: np.array(values) for name, values in change.items()}
    shapes = [feeds[name].shape for name in ("q", "keys", "values")]
    outputs, status = run_cuda_node(target, tmp_path, "CachedAttention", RIGHT.attributes, bad, shapes)
    assert status.startswith(f"[CachedAttention] value out of range: {operand} of a stream, whose state is unchanged.")
    assert status.endswith("(TITANS-E0709)")
    both = operand == "increments" or change.get("slots") == [1, 1]
    for a, before, b in zip(outputs, (None, feeds["keys"], feeds["values"]), good, strict=True):
        for stream in (0, 1) if both else (1,):
            assert np.isnan(a[stream]).all() if before is None else np.array_equal(a[stream], before[stream])
        if not both and "position" not in change:
            assert np.array_equal(a[0], b[0])


@targets
@pytest.mark.parametrize(("operand", "change"), [bad for bad in BAD if bad[0] in ("valid", "slots")])
def test_a_convolution_of_bad_values_is_left_alone(
    operand: str, change: dict[str, Any], target: Target, tmp_path: Path
) -> None:
    feeds = make_feeds(4, 40, 4, 2)
    good = convolve(target, tmp_path, feeds)
    bad = feeds | {name: np.array(values) for name, values in change.items()}
    (y, past), status = run_cuda_node(target, tmp_path, "CausalConvolution", {}, bad, [x.shape for x in good])
    assert status.startswith(f"[CausalConvolution] value out of range: {operand} of a stream")
    both = change.get("slots") == [1, 1]
    assert np.isnan(y[1]).all() and np.array_equal(past[1], feeds["past"][1])
    assert np.isnan(y[0]).all() if both else np.array_equal(y[0], good[0][0])
    assert np.array_equal(past[0], feeds["past"][0] if both else good[1][0])


@emulated
def test_what_the_kernels_do_not_take_is_refused(tmp_path: Path) -> None:
    wide = Case(width=1026, window=2, heads=1)
    feeds = wide.feeds()
    with pytest.raises(RuntimeError, match=r"\[CachedAttention\] not supported on a GPU: .* 1024 elements of a head"):
        attend(emulated_node("forward"), tmp_path, wide, feeds)
    with pytest.raises(RuntimeError, match=r"\[CachedAttention\] wrong shape of k: expected"):
        attend(emulated_node("forward"), tmp_path, RIGHT, RIGHT.feeds() | {"k": np.zeros((2, 4, 32), np.float32)})
    for operator in ("CachedAttention", "CausalConvolution", "HyperConnection"):
        node = {"heads": 1, "window": 2} if operator == "CachedAttention" else {}
        with pytest.raises(RuntimeError, match=rf"\[{operator}\] not supported on this GPU: .* 8\.0 .*, got 7\.5"):
            run_cuda_node(emulated_node("forward", "75:40:65536"), tmp_path, operator, node, feeds, [])
