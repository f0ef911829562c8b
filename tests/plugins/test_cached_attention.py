"""ai.titans::CachedAttention on the CPU: the kernel in ONNX Runtime against float64, row by row."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from attention_oracle import Array, cached_attention
from onnx import TensorProto, helper
from onnx_ops import LIBRARY, make_session
from tolerances import TOLERANCES

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernel is not built: make setup")

TOLERANCE = TOLERANCES["cpu-kernel", "float32"]
INPUTS = ("keys", "values", "q", "k", "v", "position", "increments", "valid", "slots")
OUTPUTS = ("y", "keys_out", "values_out")
TARGETS = ["avx512", "avx2", "neon", "plain"]


@dataclass(frozen=True)
class Case:
    """One call of a node. ring: rows of a group's ring; by default as few as window and segment allow."""

    width: int = 32
    heads: int = 2
    tokens: int = 1
    window: int = 0
    segment: int = 0
    persistent: int = 0
    groups: int = 1
    rotary: str = "none"
    origin: str = "stream"
    positions: tuple[int, ...] = (0,)
    valid: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None
    pool: int = 0
    ring: int = 0
    seed: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        defaults = {"window": 0, "segment": 0, "persistent": 0, "groups": 1, "rotary": "none", "origin": "stream"}
        named = {name: getattr(self, name) for name in ("heads", *defaults)}
        return {name: value for name, value in named.items() if value != defaults.get(name)}

    def feeds(self) -> dict[str, Array]:
        draw = np.random.default_rng(self.seed)
        streams = len(self.positions)
        ring = self.ring or min(size for size in (self.window, self.segment) if size)
        pool = self.pool if self.slots else streams
        cache = (pool, self.heads, self.persistent + self.groups * ring, self.width)
        rows = (streams, self.groups * self.tokens, self.heads * self.width)
        shapes = {"keys": cache, "values": cache, "q": (streams, self.tokens, rows[2]), "k": rows, "v": rows}
        feeds: dict[str, Array] = {n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        feeds["position"] = np.array(self.positions, np.int64)
        if self.rotary != "none":
            half = self.width // 2
            frequencies = 10000.0 ** (-np.arange(half) / half)
            feeds["increments"] = np.round(frequencies / (2 * np.pi) * 2**32).astype(np.int64)
        if self.valid is not None:
            feeds["valid"] = np.array(self.valid)
            for b, valid in enumerate(self.valid):  # padding has arbitrary values
                feeds["q"][b, valid:] = np.nan
                for g in range(self.groups):
                    for name in ("k", "v"):
                        feeds[name][b, g * self.tokens + valid : (g + 1) * self.tokens] = np.nan
        if self.slots is not None:
            feeds["slots"] = np.array(self.slots)
        return feeds


def make_node_model(feeds: dict[str, Array], attributes: dict[str, Any], repeat: int = 1, fixed: bool = True) -> bytes:
    """A model of `repeat` nodes over one pool. The others have inputs of their own, such as q_1. fixed: with shapes."""
    nodes, inputs, outputs = [], {}, {}
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    for i in range(repeat):
        first, last = i == 0, i == repeat - 1
        names, results = [], []
        for name in INPUTS:
            given = name if name in feeds else ""
            names.append(given if first or name not in ("q", "k", "v", "keys", "values") else f"{name}_{i}")
        while not names[-1]:
            names.pop()
        for name in OUTPUTS:
            state = name.removesuffix("_out")
            results.append((name if last else f"{state}_{i + 1}") if state != name else f"y_{i}" if i else "y")
        nodes.append(helper.make_node("CachedAttention", names, results, domain="ai.titans", **attributes))
        shared = [n for n in names if n and not n.startswith(("keys_", "values_"))]
        for name in shared:
            array = feeds[name.split("_")[0]]
            inputs[name] = helper.make_tensor_value_info(name, kinds[array.dtype], array.shape if fixed else None)
        outputs[results[0]] = feeds["q"].shape
    outputs |= {"keys_out": feeds["keys"].shape, "values_out": feeds["values"].shape}
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s if fixed else None) for n, s in outputs.items()]
    graph = helper.make_graph(nodes, "one", list(inputs.values()), results)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.titans", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def run(case: Case, feeds: dict[str, Array] | None = None, threads: int = 2) -> list[Array]:
    feeds = case.feeds() if feeds is None else feeds
    return make_session(make_node_model(feeds, case.attributes), threads).run(None, feeds)


def worst(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)) if found.size else 0.0


def check(case: Case) -> None:
    feeds = case.feeds()
    expected = cached_attention(feeds, **case.attributes)
    for name, a, b in zip(OUTPUTS, run(case, feeds), expected, strict=True):
        assert a.shape == b.shape
        assert worst(a, b) < TOLERANCE, name  # NaN fails too


LATE = (0, 1, 7, 255, 256, 1000)
CASES = {
    "decode": Case(window=256, positions=LATE, rotary="halves"),
    "decode-mac": Case(segment=256, persistent=8, groups=2, rotary="halves", origin="segment", positions=LATE, heads=4),
    "decode-pairs": Case(window=13, rotary="pairs", positions=(0, 5, 100), width=64),
    "width-1": Case(width=1, window=5, tokens=9, positions=(0, 3)),
    "width-2": Case(width=2, window=5, tokens=9, rotary="pairs", positions=(0, 3)),
    "width-6": Case(width=6, heads=3, window=5, tokens=9, rotary="pairs", positions=(0, 3)),
    "width-16": Case(width=16, window=40, tokens=64, rotary="halves", positions=(11,)),
    "width-20": Case(width=20, window=40, tokens=64, rotary="halves", positions=(11,)),
    "width-48": Case(width=48, window=40, tokens=33, rotary="pairs", positions=(11,)),
    "width-80": Case(width=80, window=40, tokens=33, rotary="halves", positions=(11,)),
    "width-100": Case(width=100, window=40, tokens=33, rotary="pairs", positions=(11,)),
    "width-128": Case(width=128, heads=1, window=64, tokens=64, rotary="halves", positions=(500,)),
    "width-256": Case(width=256, heads=1, window=20, tokens=30, rotary="halves", positions=(500,)),
    "no-tokens": Case(window=8, tokens=0, positions=(0, 9)),
    "no-streams": Case(window=8, tokens=3, positions=()),
    "two-tokens": Case(window=8, tokens=2, rotary="halves", positions=(0, 7, 8)),
    "window-of-1": Case(window=1, tokens=20, persistent=3, positions=(0, 50)),
    "longer-than-ring": Case(window=16, tokens=65, rotary="halves", positions=(0, 5, 16, 1000)),
    "longer-than-segment": Case(segment=24, tokens=65, positions=(0, 5, 24, 1000), rotary="halves", origin="segment"),
    "prefill": Case(window=256, tokens=64, rotary="halves", persistent=8, positions=(0, 64, 200, 4096)),
    "prefill-mac": Case(
        segment=256, persistent=8, groups=2, tokens=64, rotary="halves", origin="segment", positions=(192, 320), heads=4
    ),
    "segment-in-one-call": Case(segment=256, groups=2, tokens=256, rotary="halves", origin="segment", heads=1),
    "window-and-segment": Case(window=20, segment=50, tokens=65, rotary="halves", positions=(0, 3, 49, 1000)),
    "segment-in-window": Case(window=50, segment=20, tokens=200, origin="segment", rotary="pairs", positions=(3,)),
    "large-ring": Case(window=20, ring=33, tokens=65, persistent=3, groups=2, positions=(0, 31)),
    "three-groups": Case(window=20, groups=3, tokens=40, persistent=1, rotary="pairs", positions=(0, 31)),
    "padding": Case(
        window=40, tokens=65, groups=2, rotary="halves", positions=(0, 1, 9, 90, 5), valid=(0, 1, 2, 64, 65)
    ),
    "padding-of-one": Case(window=4, positions=(0, 6, 9), valid=(1, 0, 1), rotary="halves"),
    "slots": Case(window=9, tokens=20, persistent=3, positions=(0, 8, 77), slots=(4, 0, 2), pool=6, rotary="halves"),
    "slots-decode": Case(window=9, persistent=3, positions=(0, 8, 77), slots=(4, 0, 2), pool=6, valid=(1, 1, 0)),
    "position-2^31": Case(window=30, tokens=33, rotary="halves", positions=(2**31 - 9, 2**32 - 9)),
    "position-2^40": Case(window=30, tokens=2, rotary="pairs", positions=(2**40 + 1, 2**62, 2**63 - 3)),
    "segment-at-2^40": Case(segment=30, tokens=70, rotary="halves", origin="segment", positions=(2**40 + 1,)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case: Case, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_CPU_TARGET", target)
    ask = ctypes.CDLL(str(LIBRARY)).titans_onnxruntime_ops_target
    ask.restype = ctypes.c_char_p
    if ask() is None:
        pytest.skip(f"no {target} on this machine")
    check(case)


def test_random_cases() -> None:
    draw = np.random.default_rng(5)
    for seed in range(60):
        streams = int(draw.integers(1, 4))
        window, segment = (int(draw.integers(1, 70)) for _ in range(2))
        kind = draw.integers(3)
        window, segment = (window, 0) if kind == 0 else (0, segment) if kind == 1 else (window, segment)
        tokens = int(draw.choice([1, 2, 3, 17, 64, 65]))
        slots = tuple(int(i) for i in draw.permutation(5)[:streams])
        case = Case(
            width=2 * int(draw.integers(1, 40)),
            heads=int(draw.integers(1, 5)),
            tokens=tokens,
            window=window,
            segment=segment,
            persistent=int(draw.choice([0, 3, 17])),
            groups=int(draw.integers(1, 3)),
            rotary=str(draw.choice(["none", "halves", "pairs"])),
            origin="segment" if segment and draw.integers(2) else "stream",
            positions=tuple(int(draw.integers(0, 300)) for _ in range(streams)),
            valid=tuple(int(draw.integers(0, tokens + 1)) for _ in range(streams)) if draw.integers(2) else None,
            slots=slots if draw.integers(2) else None,
            pool=5,
            seed=seed,
        )
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}") from error


def rows_of(case: Case, feeds: dict[str, Array], stream: int) -> tuple[Case, dict[str, Array]]:
    """A stream of a call alone, in a pool of its own."""
    slot = int(feeds["slots"][stream]) if "slots" in feeds else stream
    alone = {n: x if n == "increments" else x[stream : stream + 1].copy() for n, x in feeds.items() if n != "slots"}
    alone |= {name: feeds[name][slot : slot + 1].copy() for name in ("keys", "values")}
    valid = None if case.valid is None else case.valid[stream : stream + 1]
    return replace(case, positions=case.positions[stream : stream + 1], valid=valid, slots=None), alone


SHARED = {
    "decode": Case(window=60, persistent=3, groups=2, rotary="halves", positions=(3, 0, 77), slots=(4, 0, 2), pool=6),
    "prefill": Case(
        window=60, tokens=64, rotary="pairs", positions=(3, 0, 77), slots=(4, 0, 2), pool=6, valid=(64, 1, 40)
    ),
    "many-streams": Case(segment=40, tokens=65, rotary="halves", origin="segment", positions=tuple(range(20)), heads=1),
}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_a_stream_is_the_same_alone(case: Case) -> None:
    feeds = case.feeds()
    y, keys, values = run(case, feeds)
    for stream in range(len(case.positions)):
        slot = case.slots[stream] if case.slots else stream
        alone = rows_of(case, feeds, stream)
        for a, b in zip(run(*alone), (y[stream], keys[slot], values[slot]), strict=True):
            np.testing.assert_array_equal(a[0], b)
    for unused in set(range(keys.shape[0])) - set(case.slots or range(len(case.positions))):
        np.testing.assert_array_equal(keys[unused], feeds["keys"][unused])
        np.testing.assert_array_equal(values[unused], feeds["values"][unused])


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_threads_change_no_bit(case: Case) -> None:
    feeds = case.feeds()
    one, *others = (run(case, feeds, threads) for threads in (1, 2, 3))
    assert all(np.array_equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", [1, 65])
def test_in_one_buffer(tokens: int) -> None:
    """Input and output pool are one: the results are those of two buffers."""
    case = Case(window=60, persistent=3, tokens=tokens, rotary="halves", positions=(3, 100))
    feeds = case.feeds()
    expected = run(case, feeds)
    session = make_session(make_node_model(feeds, case.attributes))
    binding = session.io_binding()
    pools = {name: onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name].copy()) for name in ("keys", "values")}
    for name, array in feeds.items():
        if name in pools:
            binding.bind_ortvalue_input(name, pools[name])
            binding.bind_ortvalue_output(f"{name}_out", pools[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    found = [binding.copy_outputs_to_cpu()[-1], pools["keys"].numpy(), pools["values"].numpy()]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nodes_over_one_pool() -> None:
    """Three calls in one graph, as a prefill has them: the later ones see what the earlier ones wrote."""
    case = Case(window=60, tokens=5, rotary="halves", positions=(3, 100), valid=(5, 5))
    feeds = case.feeds()
    del feeds["valid"]
    draw = np.random.default_rng(9)
    more = {f"{n}_{i}": draw.standard_normal(feeds[n].shape).astype(np.float32) for n in "qkv" for i in (1, 2)}
    session = make_session(make_node_model(feeds, case.attributes, 3))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds | more), strict=True))
    pools: dict[str, Array] = {}
    for i, name in enumerate(("y", "y_1", "y_2")):
        step = {**feeds, **pools, **({n: more[f"{n}_{i}"] for n in "qkv"} if i else {})}
        y, keys, values = cached_attention(step, **case.attributes)
        pools = {"keys": keys, "values": values}
        assert worst(found[name], y) < TOLERANCE
    assert worst(found["keys_out"], pools["keys"]) < TOLERANCE
    assert worst(found["values_out"], pools["values"]) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 40])
def test_hidden_rows_are_not_read(tokens: int) -> None:
    """Rows that no query sees hold NaN: rings that are not full, and rows before the window or the segment."""
    for case in (
        Case(window=60, persistent=3, tokens=tokens, positions=(0, 7)),
        Case(segment=60, groups=2, tokens=tokens, positions=(0, 7, 65), rotary="halves", origin="segment"),
        Case(window=9, ring=30, tokens=tokens, positions=(100,)),
    ):
        feeds = case.feeds()
        expected = cached_attention(feeds, **case.attributes)
        ring = (feeds["keys"].shape[2] - case.persistent) // case.groups
        for b, position in enumerate(case.positions):
            before = max(0, position - case.window + 1) if case.window else position // case.segment * case.segment
            seen = {row % ring for row in range(before, position)}
            hidden = sorted(set(range(ring)) - seen)
            for g in range(case.groups):
                for name in ("keys", "values"):
                    feeds[name][b][:, [case.persistent + g * ring + row for row in hidden]] = np.nan
        assert worst(run(case, feeds)[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_reaches_no_earlier_row(name: str, bad: float) -> None:
    case = Case(window=30, tokens=64, positions=(5, 5), heads=2)
    feeds = case.feeds()
    expected = run(case, feeds)[0]
    feeds[name][0, 20, 3] = bad  # in the first head of the first stream
    found = run(case, feeds)[0]
    width = case.width
    assert not np.isfinite(found[0, 20, 3])
    assert np.isfinite(found[0, :20]).all()
    assert np.isfinite(found[0, 50:]).all()
    np.testing.assert_allclose(found[0, :20], expected[0, :20], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(found[0, :, width:], expected[0, :, width:])
    np.testing.assert_array_equal(found[1], expected[1])


def test_large_scores() -> None:
    """The largest score of a row takes all the weight, and exponentials do not overflow."""
    for tokens in (1, 40):
        case = Case(window=30, tokens=tokens, positions=(50,))
        feeds = case.feeds()
        feeds["q"] *= 1000
        y, *_ = cached_attention(feeds, **case.attributes)
        # Scores are of order 1000, so float32 leaves an error of 1e-4 of them in the exponent.
        assert np.abs(run(case, feeds)[0] - y).max() < 1e-2


RIGHT = Case(window=8, segment=6, persistent=2, groups=2, tokens=4, rotary="halves", positions=(3, 4), width=16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": (2, 2, 14)}, "wrong rank of keys: expected 4, got 3"),
        ({"q": (2, 4, 2, 16)}, "wrong rank of q: expected 3, got 4"),
        ({"keys": (2, 3, 14, 16)}, "wrong shape of keys: expected 2 heads, got 3"),
        ({"keys": (2, 2, 14, 0)}, "wrong shape of keys: expected a width of at least 1, got 0"),
        ({"keys": (2, 2, 14, 15)}, "wrong shape of keys: expected an even width for rotation, got 15"),
        (
            {"keys": (2, 2, 12, 16)},
            "wrong shape of keys: expected 2 persistent rows and 2 times at least 6 rows, got 12",
        ),
        (
            {"keys": (2, 2, 15, 16)},
            "wrong shape of keys: expected 2 persistent rows and 2 times at least 6 rows, got 15",
        ),
        ({"keys": (3, 2, 14, 16)}, r"wrong shape of keys: expected \(2, 2, 14, 16\), got \(3, 2, 14, 16\)"),
        ({"values": (2, 2, 16, 16)}, r"wrong shape of values: expected \(2, 2, 14, 16\), got \(2, 2, 16, 16\)"),
        ({"q": (2, 4, 48)}, r"wrong shape of q: expected \(2, 4, 32\), got \(2, 4, 48\)"),
        ({"k": (2, 4, 32)}, r"wrong shape of k: expected \(2, 8, 32\), got \(2, 4, 32\)"),
        ({"v": (2, 9, 32)}, r"wrong shape of v: expected \(2, 8, 32\), got \(2, 9, 32\)"),
        ({"position": (3,)}, r"wrong shape of position: expected \(2\), got \(3\)"),
        ({"increments": (16,)}, r"wrong shape of increments: expected \(8\), got \(16\)"),
        ({"increments": None}, "missing operand: increments"),
        ({"valid": (1,)}, r"wrong shape of valid: expected \(2\), got \(1\)"),
        ({"slots": (1,)}, r"wrong shape of slots: expected \(2\), got \(1\)"),
    ],
)
def test_wrong_operands_are_refused(change: dict[str, tuple[int, ...] | None], words: str) -> None:
    feeds = RIGHT.feeds()
    for name, shape in change.items():
        if shape is None:
            del feeds[name]
        else:
            feeds[name] = np.zeros(shape, np.int64 if len(shape) == 1 else np.float32)
    session = make_session(make_node_model(feeds, RIGHT.attributes, fixed=False))
    with pytest.raises(Exception, match=rf"\[CachedAttention\] {words}\. Fix: "):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": [0, -1]}, r"position of stream 1: expected \[0, 9223372036854775804\), got -1"),
        ({"position": [2**63 - 4, 0]}, r"position of stream 0: expected .*, got 9223372036854775804"),
        ({"increments": [0] * 7 + [2**32]}, r"increments of dimension 7: expected \[0, 4294967296\), got 4294967296"),
        ({"increments": [-1] * 8}, r"increments of dimension 0: expected \[0, 4294967296\), got -1"),
        ({"valid": [4, 5]}, r"valid of stream 1: expected \[0, 5\), got 5"),
        ({"valid": [-1, 4]}, r"valid of stream 0: expected \[0, 5\), got -1"),
        ({"slots": [0, 2]}, r"slots of stream 1: expected \[0, 2\), got 2"),
        ({"slots": [1, 1]}, "slots has 1 twice"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, list[int]], words: str) -> None:
    """And nothing is written."""
    feeds = RIGHT.feeds() | {name: np.array(values) for name, values in change.items()}
    session = make_session(make_node_model(feeds, RIGHT.attributes))
    binding = session.io_binding()
    pools = {name: onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name].copy()) for name in ("keys", "values")}
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.full_like(feeds["q"], 7))
    for name, array in feeds.items():
        if name in pools:
            binding.bind_ortvalue_input(name, pools[name])
            binding.bind_ortvalue_output(f"{name}_out", pools[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_ortvalue_output("y", y)
    with pytest.raises(Exception, match=rf"\[CachedAttention\] value out of range: {words}\. Fix: "):
        session.run_with_iobinding(binding)
    assert all(np.array_equal(pool.numpy(), feeds[name]) for name, pool in pools.items())
    assert (y.numpy() == 7).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": None}, "missing attribute: heads"),
        ({"heads": 0}, r"invalid attribute heads: expected \[1, 65536\], got 0"),
        ({"window": -1}, r"invalid attribute window: expected \[0, 2147483648\], got -1"),
        ({"segment": -1}, r"invalid attribute segment: expected \[0, 2147483648\], got -1"),
        ({"persistent": -1}, r"invalid attribute persistent: expected \[0, 2147483648\], got -1"),
        ({"groups": 0}, r"invalid attribute groups: expected \[1, 16\], got 0"),
        ({"rotary": "full"}, 'invalid attribute rotary: expected "none" or "halves" or "pairs", got "full"'),
        ({"origin": "row"}, 'invalid attribute origin: expected "stream" or "segment", got "row"'),
        ({"window": 0, "segment": 0}, "contradicting attributes: window or segment must be positive, got 0 and 0"),
        (
            {"segment": 0, "origin": "segment"},
            'contradicting attributes: origin "segment" needs a positive segment, got 0',
        ),
    ],
)
def test_wrong_attributes_are_refused(change: dict[str, Any], words: str) -> None:
    attributes = {name: value for name, value in (RIGHT.attributes | change).items() if value is not None}
    with pytest.raises(Exception, match=rf"\[CachedAttention\] {words}\. Fix: "):
        make_session(make_node_model(RIGHT.feeds(), attributes))


def test_increments_without_rotation_are_refused() -> None:
    feeds = RIGHT.feeds()
    session = make_session(make_node_model(feeds, RIGHT.attributes | {"rotary": "none"}))
    with pytest.raises(Exception, match=r"\[CachedAttention\] unexpected operand: increments with rotary \"none\""):
        session.run(None, feeds)


def test_memory_that_overlaps_is_refused() -> None:
    feeds = RIGHT.feeds()
    session = make_session(make_node_model(feeds, RIGHT.attributes))
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    keys = feeds["keys"]
    binding.bind_output("y")
    binding.bind_output("values_out", "cpu", 0, np.float32, keys.shape, keys.ctypes.data)
    binding.bind_output("keys_out")
    with pytest.raises(Exception, match=r"\[CachedAttention\] overlapping buffers: values_out and keys\. Fix: "):
        session.run_with_iobinding(binding)
