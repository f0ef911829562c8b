"""CachedAttention and CausalConvolution: the references and the function bodies against NumPy row by row, and against
PyTorch's attention and convolution over whole streams.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from attention_oracle import cached_attention as cached_attention_oracle
from attention_oracle import causal_convolution as causal_convolution_oracle
from onnx import TensorProto, helper
from tolerances import TOLERANCES

from titans_export.model import cached_attention, causal_convolution
from titans_export.model.cached_attention import AttentionSpec, phase_angles, phase_increments, rotate
from titans_export.onnx.functions import build_function
from titans_export.onnx.tracing import IR_VERSION, OPSET
from titans_export.operators import CACHED_ATTENTION, CAUSAL_CONVOLUTION, DOMAIN, VERSION, Operator

EXACT, SINGLE = TOLERANCES["cpu", "float64"], TOLERANCES["cpu-kernel", "float32"]
REFERENCES = {"CachedAttention": cached_attention.reference, "CausalConvolution": causal_convolution.reference}
ORACLES: dict[str, Any] = {
    "CachedAttention": cached_attention_oracle,
    "CausalConvolution": causal_convolution_oracle,
}
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
Feeds = dict[str, torch.Tensor]

WIDTH = 6
# Attributes, rows per ring.
ATTENTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "window": ({"heads": 2, "window": 5, "rotary": "halves"}, 5),
    "window, persistent": ({"heads": 2, "window": 5, "persistent": 3, "rotary": "halves"}, 5),
    "window of 1": ({"heads": 1, "window": 1}, 1),
    "segment": ({"heads": 2, "segment": 4, "rotary": "pairs"}, 4),
    "segment, groups": (
        {"heads": 3, "segment": 8, "persistent": 2, "groups": 2, "rotary": "halves", "origin": "segment"},
        8,
    ),
    "window in segments": ({"heads": 2, "window": 3, "segment": 7, "rotary": "pairs", "origin": "segment"}, 3),
    "longer ring": ({"heads": 2, "window": 5, "persistent": 1, "rotary": "pairs"}, 9),
    "three groups, longer ring": ({"heads": 1, "segment": 5, "groups": 3}, 8),
}
# Streams, rows, positions, valid, slots of four.
CALLS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "start": (1, 1, (0,), None, None),
    "one row": (3, 1, (7, 0, 2_000_000_003), None, None),
    "rows": (2, 4, (3, 11), None, None),
    "more rows than a ring": (2, 21, (6, 0), None, None),
    "padded": (3, 4, (9, 2, 0), (3, 4, 0), None),
    "padded, more rows than a ring": (2, 21, (13, 0), (2, 20), None),
    "slots": (2, 1, (5, 40), None, (3, 1)),
    "slots, padded": (3, 6, (5, 0, 17), (6, 0, 1), (2, 0, 3)),
}


def _attention(kind: str, call: str, dtype: torch.dtype) -> tuple[dict[str, Any], Feeds]:
    values, ring = ATTENTIONS[kind]
    spec = AttentionSpec(**values)
    batch, length, position, valid, slots = CALLS[call]
    torch.manual_seed(len(kind) * 100 + len(call))
    pool = (4 if slots else batch, spec.heads, spec.persistent + spec.groups * ring, WIDTH)
    inner = spec.heads * WIDTH
    feeds = {name: torch.randn(pool, dtype=dtype) for name in ("keys", "values")}
    feeds["q"] = torch.randn(batch, length, inner, dtype=dtype)
    feeds |= {name: torch.randn(batch, spec.groups * length, inner, dtype=dtype) for name in ("k", "v")}
    feeds["position"] = torch.tensor(position)
    if spec.rotary != "none":
        feeds["increments"] = phase_increments(torch.tensor([1.0, 0.1, 0.003]))[0]
    if valid:
        feeds["valid"] = torch.tensor(valid)
        for b, count in enumerate(valid):  # padding may hold anything
            feeds["q"][b, count:] = math.nan
            for name in ("k", "v"):
                feeds[name].view(batch, spec.groups, length, inner)[b, :, count:] = math.nan
    if slots:
        feeds["slots"] = torch.tensor(slots)
    return values, feeds


def _convolution(kind: str, call: str, dtype: torch.dtype) -> tuple[dict[str, Any], Feeds]:
    batch, length, _, valid, slots = CALLS[call]
    taps = 2 if kind == "two taps" else 4
    torch.manual_seed(len(kind) * 100 + len(call))
    feeds = {"past": torch.randn(4 if slots else batch, taps - 1, 5, dtype=dtype)}
    feeds |= {"x": torch.randn(batch, length, 5, dtype=dtype), "weight": torch.randn(taps, 5, dtype=dtype)}
    values = {"activation": "silu"} if kind == "silu" else {}
    if kind in ("bias", "silu"):
        feeds["bias"] = torch.randn(5, dtype=dtype)
    if valid:
        feeds["valid"] = torch.tensor(valid)
        for b, count in enumerate(valid):
            feeds["x"][b, count:] = math.nan
    if slots:
        feeds["slots"] = torch.tensor(slots)
    return values, feeds


def _expected(operator: Operator, values: dict[str, Any], feeds: Feeds) -> list[Any]:
    return list(ORACLES[operator.name]({name: x.numpy() for name, x in feeds.items()}, **values))


def _body(operator: Operator, values: dict[str, Any], feeds: Feeds, outputs: list[Any]) -> list[Any]:
    """The outputs of a node's function body in ONNX Runtime."""
    node = helper.make_node(operator.name, operator.operands(feeds), list(operator.outputs), domain=DOMAIN, **values)
    body = build_function({name: tuple(x.shape) for name, x in feeds.items()}, node)
    node.overload = body.overload
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, TYPES[operator.dtype(n)], x.shape) for n, x in feeds.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape)
            for n, x in zip(operator.outputs, outputs, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in feeds.items()})


def _check(operator: Operator, make: Any, kind: str, call: str, how: str) -> None:
    values, feeds = make(kind, call, torch.float64 if how == "reference" else torch.float32)
    expected = _expected(operator, values, feeds)
    if how == "reference":
        found = [x.numpy() for x in REFERENCES[operator.name](operator.complete(values), feeds)(**feeds)]
    else:
        found = _body(operator, values, feeds, expected)
    for name, got, right in zip(operator.outputs, found, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=EXACT if how == "reference" else SINGLE, err_msg=name)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_is_its_definition(kind: str, call: str) -> None:
    _check(CACHED_ATTENTION, _attention, kind, call, "reference")


@pytest.mark.sample(5)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_body_of_attention_is_its_definition(kind: str, call: str) -> None:
    _check(CACHED_ATTENTION, _attention, kind, call, "body")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["plain", "two taps", "bias", "silu"])
def test_convolution_is_its_definition(kind: str, call: str) -> None:
    _check(CAUSAL_CONVOLUTION, _convolution, kind, call, "reference")


@pytest.mark.sample(5)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["plain", "two taps", "bias", "silu"])
def test_the_body_of_convolution_is_its_definition(kind: str, call: str) -> None:
    _check(CAUSAL_CONVOLUTION, _convolution, kind, call, "body")


@pytest.mark.parametrize("kind", ["window, persistent", "segment", "window in segments", "longer ring"])
def test_a_stream_in_calls_is_pytorchs_attention_over_all_of_it(kind: str) -> None:
    """Two streams at once, in calls of uneven lengths, against one masked attention over 60 rows."""
    values, ring = ATTENTIONS[kind]
    spec, batch, length = AttentionSpec(**values), 2, 60
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, spec.heads * WIDTH, dtype=torch.float64) for _ in range(3))
    keys = torch.zeros(batch, spec.heads, spec.persistent + ring, WIDTH, dtype=torch.float64)
    values_ = keys.clone()
    keys[:, :, : spec.persistent] = torch.randn(spec.heads, spec.persistent, WIDTH, dtype=torch.float64)
    values_[:, :, : spec.persistent] = torch.randn(spec.heads, spec.persistent, WIDTH, dtype=torch.float64)
    first = keys[:, :, : spec.persistent].clone(), values_[:, :, : spec.persistent].clone()
    increments = phase_increments(torch.tensor([1.0, 0.1, 0.003]))[0]
    out, at = [], 0
    for count in (1, 1, 4, 17, 1, 30, 2, 1, 3):
        part = slice(at, at + count)
        position = torch.full((batch,), at)
        y, keys, values_ = cached_attention.cached_attention(
            spec, keys, values_, q[:, part], k[:, part], v[:, part], position, increments
        )
        out.append(y)
        at += count
    assert at == length
    rows = torch.arange(length)
    seen = rows <= rows[:, None]
    if spec.window:
        seen &= rows > rows[:, None] - spec.window
    if spec.segment:
        seen &= rows // spec.segment == rows[:, None] // spec.segment
    seen = F.pad(seen, (spec.persistent, 0), value=True)
    places = (rows % spec.segment if spec.origin == "segment" else rows).expand(batch, -1)

    def heads(x: torch.Tensor, turned: bool) -> torch.Tensor:
        x = x.view(batch, length, spec.heads, WIDTH).transpose(1, 2)
        return rotate(x, phase_angles(places, increments, x.dtype), spec.rotary) if turned else x

    every = [
        torch.cat([rows_, heads(x, turned)], 2) for rows_, x, turned in zip(first, (k, v), (True, False), strict=True)
    ]
    right = F.scaled_dot_product_attention(heads(q, True), *every, attn_mask=seen)
    torch.testing.assert_close(torch.cat(out, 1), right.transpose(1, 2).reshape(q.shape), rtol=0, atol=EXACT)


def test_a_stream_in_calls_is_pytorchs_convolution_over_all_of_it() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 31, 5), (4, 5), (5,)))
    past, out, at = torch.zeros(2, 3, 5, dtype=torch.float64), [], 0
    for count in (1, 2, 1, 20, 7):
        y, past = causal_convolution.causal_convolution(past, x[:, at : at + count], weight, bias)
        out.append(y)
        at += count
    right = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight.t().unsqueeze(1), bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(torch.cat(out, 1), right, rtol=0, atol=EXACT)


def test_gradients_of_attention_are_those_of_differences() -> None:
    """Training differentiates the reference."""
    values, feeds = _attention("segment, groups", "rows", torch.float64)
    spec = AttentionSpec(**values)

    def outputs(*given: torch.Tensor) -> Any:
        return cached_attention.cached_attention(spec, *given, feeds["position"], feeds["increments"])[0]

    given = [feeds[name].requires_grad_() for name in ("keys", "values", "q", "k", "v")]
    assert torch.autograd.gradcheck(outputs, given, fast_mode=True)


def test_bodies_are_named_by_their_configuration() -> None:
    values, feeds = _attention("segment, groups", "slots", torch.float32)
    node = helper.make_node(
        "CachedAttention", CACHED_ATTENTION.operands(feeds), list(CACHED_ATTENTION.outputs), **values
    )
    body = build_function({name: tuple(x.shape) for name, x in feeds.items()}, node)
    assert body.overload == "b2_t1_n18_d6_p4_h3_segment8_f2_g2_halves_from_segment_slots"
    values, feeds = _convolution("silu", "slots, padded", torch.float32)
    node = helper.make_node("CausalConvolution", CAUSAL_CONVOLUTION.operands(feeds), ["y", "past_out"], **values)
    body = build_function({name: tuple(x.shape) for name, x in feeds.items()}, node)
    assert body.overload == "b3_t6_c5_w4_p4_silu_bias_valid_slots"
