"""The kernels of ChunkNeuralMemory, for every instruction set and CUDA's on emulated GPUs, against its equations with
autograd in float64 (chunk_oracle.py) and against titans-pytorch itself; the CPU's also through ONNX Runtime.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import random_cuts, worst
from chunk_oracle import ChunkCase, Stream, flat, fresh_rows, make_node, option, split, unpack
from kernel_runner import CUDA_EMULATED, EMULATED_GPUS, Result, Target, cpu_targets, cuda_targets, run_node
from onnx_ops import Arrays, make_model, make_session
from tolerances import TOLERANCES
from torch import Tensor

targets = pytest.mark.parametrize("target", [*cpu_targets(), *cuda_targets(few=True)])
TOLERANCE = TOLERANCES["cpu-kernel", "float32"]
ORTHOGONAL = TOLERANCES["cpu-kernel-orthogonal", "float32"]
emulated = pytest.mark.skipif(not CUDA_EMULATED.exists(), reason=f"no {CUDA_EMULATED}: make kernels")
AROUND = {"residual": 1, "layer_norm": 1}
FAST = AROUND | {"norm_weight": "fast"}
# What train_mac.py of titans-pytorch has, but for its widths.
MAC: dict[str, Any] = {"activation": "gelu", "batch_size": 8, "orthogonalise": 5, **FAST}

# Attributes, length, and whether there are modulation and previous weights.
CASES: dict[str, tuple[dict[str, Any], int, bool, bool]] = {
    "linear": ({"widths": (6, 6)}, 19, False, False),
    "mlp2": ({}, 19, False, False),
    "mlp3-gelu": ({"widths": (6, 10, 9, 6), "activation": "gelu"}, 19, True, False),
    "residual": ({"residual": 1, "activation": "gelu"}, 19, False, True),
    "norm-slow": (AROUND, 19, True, False),
    "norm-slow-no-residual": ({"layer_norm": 1, "widths": (6, 6)}, 19, False, False),
    "norm-fast": (FAST, 19, True, True),
    "norm-fast-linear": ({"widths": (17, 17), **FAST}, 19, True, False),
    "batch-0": ({"batch_size": 0}, 19, False, False),
    "batch-2": ({"batch_size": 8, **FAST}, 27, False, False),
    "batch-8": ({"batch_size": 32, "widths": (6, 6)}, 75, False, True),
    "keys-2": ({"keys_per_token": 2, "batch_size": 8}, 19, False, False),
    "lookahead": ({"lookahead": 1}, 19, True, False),
    "keys-2-lookahead": ({"keys_per_token": 2, "lookahead": 1, "batch_size": 0, **FAST}, 19, True, True),
    "lookahead-of-nothing": ({"lookahead": 1, "chunk_size": 1, "grad_clamp": 0.5}, 5, False, False),
    "momentum-0": ({"momentum_order": 0}, 19, True, False),
    "clamp": ({"grad_clamp": 0.7, **FAST}, 19, True, False),
    "clamp-that-enlarges": ({"grad_clamp": 4.0, "momentum_order": 0}, 19, False, False),
    "chunk-1": ({"chunk_size": 1, "batch_size": 4}, 11, True, True),
    "chunk-33": ({"chunk_size": 33, "widths": (31, 67, 31), "activation": "gelu", **FAST}, 80, True, False),
    "orthogonal": ({"orthogonalise": 5}, 19, True, False),
    "orthogonal-linear": ({"orthogonalise": 5, "widths": (17, 17), "chunk_size": 16}, 40, False, False),
    "orthogonal-momentum-0": ({"widths": (6, 10, 9, 6), "orthogonalise": 4, "momentum_order": 0}, 19, False, True),
    "orthogonal-1": ({"orthogonalise": 1, "widths": (20, 33, 20)}, 19, False, False),
    "mac": (MAC, 38, True, True),
    "mac-64": ({"widths": (64, 128, 64), **MAC}, 38, True, True),
}
cases = pytest.mark.parametrize("name", CASES)


def _leave_out_large(target: Target, name: str) -> None:
    if target.cuda and name == "mac-64":
        pytest.skip("half a minute in the emulation: test_a_large_memory_on_emulated_gpus has it")


@cache
def _case(name: str, length: int | None = None) -> ChunkCase:
    attributes, default, modulation, previous = CASES[name]
    return ChunkCase(make_node(**attributes), length or default, modulation, previous)


@cache
def _streams(case: ChunkCase) -> dict[tuple[int, int], Stream]:
    return {(b, h): case.stream(b, h) for b in range(case.streams) for h in range(case.heads)}


@cache
def _tolerance(case: ChunkCase) -> float:
    """Newton-Schulz amplifies rounding, more or less with the directions of a surprise: three times what PyTorch's
    own float32 is off by on this very case, the most of a few ways of rounding, as processors differ in theirs.
    """
    if not option(case.node, "orthogonalise"):
        return TOLERANCE
    own = 0.0
    for at, exact in _streams(case).items():
        for jitter in (None, 1, 2, 3):
            single = _values(case, case.stream(*at, torch.float32, jitter=jitter))
            pairs = [(x.double(), y) for x, y in zip(single, _values(case, exact), strict=True)]
            own = max(own, worst(*pairs, floor=1e-3))
    return min(ORTHOGONAL, max(TOLERANCE, 3 * own))


def _values(case: ChunkCase, stream: Stream, before: bool = True) -> list[Tensor]:
    """All that _expect() compares."""
    return [stream.y, *_weights(case, stream).values(), *(stream.initial_weights if before else [])]


def _expect(case: ChunkCase, result: Result, cuts: list[int], tolerance: float) -> None:
    """Everything that comes out is the oracle's."""
    chunk = case.node["chunk_size"]
    fields = unpack(case.node, result.state.double())
    stats = torch.stack(result.stats).double()
    for (b, h), exact in _streams(case).items():
        found = [torch.cat(result.y, 2)[b, h], *(fields[name][b, h] for name in _weights(case, exact))]
        done = 0
        for cut, before in zip(cuts, result.initial_weights, strict=True):
            found += before[b, h, : (done + cut) // chunk - done // chunk]
            done += cut
        pairs = [
            (x.double(), y) for x, y in zip(found, _values(case, exact, bool(result.initial_weights)), strict=True)
        ]
        assert worst(*pairs, floor=1e-3) < tolerance, (b, h)
        losses, norms = ([x for x in values if x is not None] for values in (exact.loss, exact.norm))
        assert stats[:, b, h, 0].sum().item() == pytest.approx(sum(losses), rel=tolerance)
        assert stats[:, b, h, 1].max().item() == pytest.approx(max(norms), rel=tolerance)
        assert stats[:, b, h, 2:].sum(0).tolist() == [case.length // chunk, 0]


def _weights(case: ChunkCase, exact: Stream) -> dict[str, Tensor]:
    fields = {"W": exact.w}
    if option(case.node, "batch_size") != case.node["chunk_size"]:
        fields["G"] = exact.g
    if option(case.node, "momentum_order"):
        fields["S"] = exact.s
    return fields


@targets
@cases
def test_any_cut_equals_the_equations(target: Target, name: str, tmp_path: Path) -> None:
    _leave_out_large(target, name)
    case = _case(name)
    length = case.length
    for cuts in ([length], [1] * length, random_cuts(length, seed=1)):
        result = run_node(target, tmp_path, case.node, case.rows(), case.calls(cuts), ("--initial-weights",))
        _expect(case, result, cuts, _tolerance(case))


@targets
@cases
def test_whole_chunks_equal_the_equations(target: Target, name: str, tmp_path: Path) -> None:
    _leave_out_large(target, name)
    chunk = CASES[name][0].get("chunk_size", 4)
    case = _case(name, CASES[name][1] // chunk * chunk)
    node = case.node | {"schedule": "aligned"}
    length = case.length
    for cuts in ([length], [chunk, 0, length - chunk]):
        ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
        calls = [case.call(end - cut, end, aligned=True) for cut, end in zip(cuts, ends, strict=True)]
        result = run_node(target, tmp_path, node, case.rows(), calls, ("--initial-weights",))
        _expect(case, result, cuts, _tolerance(case))


@targets
@pytest.mark.parametrize("name", ["batch-2", "keys-2-lookahead"])
def test_streams_of_one_call_may_stand_anywhere(target: Target, name: str, tmp_path: Path) -> None:
    """Ragged rows in chosen slots of a pool: each stream as if alone, padding may hold NaN, other rows untouched."""
    attributes, _, modulation, previous = CASES[name]
    node = make_node(**attributes)
    case = ChunkCase(node, 30, modulation, previous, streams=3)
    u, chunk = option(node, "keys_per_token"), node["chunk_size"]
    slots = torch.tensor([4, 0, 2])
    pool = torch.randn(6, case.heads, case.rows().shape[-1], dtype=torch.float64)
    others = pool.float()[[1, 3, 5]]
    pool[slots] = case.rows()
    done, counts = [0, 0, 0], [[5, 1, 0], [3, 4, 2], [0, 4, 1], [4, 0, 4], [4, 14, 4], [2, 3, 4]]
    calls: list[dict[str, Tensor]] = []
    for valid in counts:
        call = {"fill": torch.tensor([d % case.period for d in done]), "valid": torch.tensor(valid), "slots": slots}
        longest = max(valid)
        for key, x in case.inputs.items():
            rows = longest * (u if key in ("k", "v", "step_size") else 1)
            rows = -(-longest // chunk) if key == "previous" else rows
            padded = torch.full((3, case.heads, rows, *x.shape[3:]), math.nan, dtype=torch.float64)
            for b, n in enumerate(valid):
                by = u if key in ("k", "v", "step_size") else 1
                first, last = done[b] * by, (done[b] + n) * by
                if key == "previous":
                    first, last = done[b] // chunk, (done[b] + n) // chunk
                padded[b, :, : last - first] = x[b, :, first:last]
            call[key] = padded
        calls.append(call)
        done = [d + n for d, n in zip(done, valid, strict=True)]
    result = run_node(target, tmp_path, node, pool, calls)
    assert torch.equal(result.state[[1, 3, 5]], others)
    for b in range(3):
        y = torch.cat([part[b, :, : valid[b]] for part, valid in zip(result.y, counts, strict=True)], 1)
        assert all(not part[b, :, valid[b] :].any() for part, valid in zip(result.y, counts, strict=True))
        for h in range(case.heads):
            assert worst((y[h].double(), case.stream(b, h).y[: done[b]])) < TOLERANCE


@targets
@pytest.mark.parametrize("name", ["mlp2", "batch-2", "keys-2-lookahead"])
def test_a_frozen_token_has_no_step_and_drops_the_chunk_that_it_completes(
    target: Target, name: str, tmp_path: Path
) -> None:
    cuts = [2, 1, 1, 3, 2, 4, 3, 8, 3]
    learning = [True, False, True, True, False, False, True, False, True]
    case = _case(name, sum(cuts))
    calls = case.calls(cuts)
    for call, learn in zip(calls, learning, strict=True):
        call["learn"] = torch.tensor([learn, True])
    result = run_node(target, tmp_path, case.node, case.rows(), calls, ("--initial-weights",))
    flags = [on for on, cut in zip(learning, cuts, strict=True) for _ in range(cut)]
    stats = torch.stack(result.stats).double().sum(0)
    fields = unpack(case.node, result.state.double())
    for h in range(case.heads):
        for b, learn in ((0, flags), (1, None)):
            exact = case.stream(b, h, learn=learn)
            pairs = [(torch.cat(result.y, 2)[b, h].double(), exact.y)]
            pairs += [(fields[name][b, h], value) for name, value in _weights(case, exact).items()]
            assert worst(*pairs) < TOLERANCE
            losses = [x for x in exact.loss if x is not None]
            assert len(losses) == (6 if b == 1 else 2)
            assert stats[b, h, 0].item() == pytest.approx(sum(losses), rel=TOLERANCE)
            assert stats[b, h, 2:].tolist() == [len(losses), 0]


@targets
def test_frozen_chunks_leave_every_bit_of_the_weights(target: Target, tmp_path: Path) -> None:
    case = _case("mac")
    rows = run_node(target, tmp_path, case.node, case.rows(), case.calls([16])).state
    for cuts in ([16], [1] * 16, [3, 5, 8]):
        calls = case.calls(cuts)
        for call in calls:
            call["learn"] = torch.tensor([False, False])
            call["k"] = torch.full_like(call["k"], math.nan)
        result = run_node(target, tmp_path, case.node, rows, calls)
        before, after = unpack(case.node, rows), unpack(case.node, result.state)
        assert all(torch.equal(before[name], after[name]) for name in "WGS")
        assert not torch.stack(result.stats).any()


@targets
@pytest.mark.parametrize("name", ["batch-2", "orthogonal", "momentum-0"])
def test_guard_drops_a_chunk_that_is_too_large_or_not_a_number(target: Target, name: str, tmp_path: Path) -> None:
    attributes, _, modulation, previous = CASES[name]
    case = ChunkCase(make_node(**attributes), 24, modulation, previous, streams=3)
    norms = [max(x for x in case.stream(b, h).norm if x is not None) for b in range(3) for h in range(case.heads)]
    limit = 1.5 * max(norms)
    # Of an orthogonal update the size does not tell: a forget gate that turns W round does.
    case.inputs["forget_gate"][1, :, 7] = 300.0
    case.inputs["v"][2, 0, 13] = math.nan
    for cuts in ([24], [1] * 24, [3, 7, 6, 2, 6]):
        calls = case.calls(cuts)
        for call in calls:
            call["update_limit"] = torch.full((3,), limit)
        result = run_node(target, tmp_path, case.node, case.rows(), calls, ("--initial-weights",))
        total = torch.stack(result.stats).double().sum(0)
        assert total[..., 2].tolist() == [[6, 6], [5, 5], [5, 6]]
        assert total[..., 3].tolist() == [[0, 0], [1, 1], [1, 0]]
        fields = unpack(case.node, result.state.double())
        for b in range(3):
            for h in range(case.heads):
                exact = case.stream(b, h, limit=limit)
                whole = slice(0, 12) if (b, h) == (2, 0) else slice(None)
                pairs = [(torch.cat(result.y, 2)[b, h, whole].double(), exact.y[whole])]
                pairs += [(fields[name][b, h], value) for name, value in _weights(case, exact).items()]
                assert worst(*pairs) < (ORTHOGONAL if name == "orthogonal" else TOLERANCE)
        norms_said = torch.stack(result.stats)[..., 1]
        assert bool((norms_said[:, 1].amax(0) > limit).all()), "the norm of what was dropped is told"


@targets
def test_a_gradient_of_zeros_stays_zeros(target: Target, tmp_path: Path) -> None:
    """The clamp divides by a norm, Newton-Schulz too."""
    node = make_node(grad_clamp=0.7, orthogonalise=5, momentum_order=0, **FAST)
    case = ChunkCase(node, 8)
    case.inputs["step_size"][:] = 0
    result = run_node(target, tmp_path, node, case.rows(), case.calls([8]))
    kept = (1 - case.inputs["forget_gate"][:, :, 3]) * (1 - case.inputs["forget_gate"][:, :, 7])
    expected = case.weights * kept[..., None]
    assert worst((unpack(node, result.state.double())["W"], expected)) < TOLERANCE


@targets
@pytest.mark.parametrize("name", ["mac", "chunk-33"])
def test_threads_buffers_and_the_optional_output_change_no_bit(target: Target, name: str, tmp_path: Path) -> None:
    case = _case(name)
    rows, calls = case.rows(), case.calls(random_cuts(case.length, seed=3))
    one = run_node(target, tmp_path, case.node, rows, calls)
    for options in (*target.harmless_options, ("--initial-weights",)):
        other = run_node(target, tmp_path, case.node, rows, calls, options)
        parts = zip([*one.y, *one.stats, one.state], [*other.y, *other.stats, other.state], strict=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in parts), options


# ---- what only the CUDA kernel has ----


@pytest.mark.long
@pytest.mark.parametrize("target", cuda_targets())
def test_a_large_memory_on_emulated_gpus(target: Target, tmp_path: Path) -> None:
    case = _case("mac-64")
    cuts = [20, 1, 1, 16]
    result = run_node(target, tmp_path, case.node, case.rows(), case.calls(cuts), ("--initial-weights",))
    _expect(case, result, cuts, _tolerance(case))


@emulated
@pytest.mark.parametrize("name", ["mac", "clamp", "orthogonal-momentum-0", "keys-2-lookahead", "chunk-33"])
def test_who_runs_first_changes_no_bit(name: str, tmp_path: Path) -> None:
    """What one thread does before another between two barriers must not matter: it would be a race on a GPU."""
    cuts = [1, 35, 3, 30] if name == "chunk-33" else [1, 5, 1, 7]
    case = ChunkCase(make_node(**CASES[name][0]), sum(cuts), *CASES[name][2:], streams=1)
    calls = case.calls(cuts)
    calls[1]["update_limit"] = torch.tensor([1e3])
    results = []
    for order in ("forward", "reverse", "1", "2", "3"):
        environment = (("TITANS_EMULATED_GPU", EMULATED_GPUS["small"][0]), ("TITANS_EMULATED_ORDER", order))
        target = Target("emulated", (str(CUDA_EMULATED),), environment=environment, cuda=True)
        results.append(run_node(target, tmp_path, case.node, case.rows(), calls, ("--initial-weights",)))
    for other in results[1:]:
        one = results[0]
        parts = zip([*one.y, *one.stats, one.state], [*other.y, *other.stats, other.state], strict=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in parts)


@emulated
@pytest.mark.parametrize(
    ("operand", "value"),
    [("fill", 8), ("valid", 6), ("slots", 4), *((gate, math.nan) for gate in (
        "step_size", "momentum", "forget_gate", "modulation", "previous_gate"))],
)  # fmt: skip
def test_a_stream_with_bad_values_is_left_alone_and_others_go_on(operand: str, value: float, tmp_path: Path) -> None:
    [target] = cuda_targets()[-1].values  # type: ignore[attr-defined]
    case = ChunkCase(make_node(**MAC), 5, True, True, streams=2)
    pool = torch.randn(4, case.heads, case.rows().shape[-1], dtype=torch.float64)
    slots = torch.tensor([3, 1])
    pool[slots] = case.rows()
    [call] = case.calls([5])
    call |= {"slots": slots, "valid": torch.full((2,), 5)}
    good = run_node(target, tmp_path, case.node, pool, [call])
    bad = {name: x.clone() for name, x in call.items()}
    if operand in ("fill", "valid", "slots"):
        bad[operand][1] = int(value)
    else:
        bad[operand].view(2, case.heads, -1)[1, 1, -1] = value
    words = "value out of range" if operand in ("fill", "valid", "slots") else "gate not finite"
    with pytest.raises(RuntimeError, match=rf"\[ChunkNeuralMemory\] {words}: {operand} of a stream.*\. Fix: "):
        run_node(target, tmp_path, case.node, pool, [bad])
    result = run_node(target, tmp_path, case.node, pool, [bad], ("--keep-going",))
    assert torch.equal(result.state[[0, 1, 2]].view(torch.int32), pool.float()[[0, 1, 2]].view(torch.int32))
    assert torch.isnan(result.y[0][1]).all() and torch.isnan(result.stats[0][1]).all()
    assert torch.equal(result.y[0][0], good.y[0][0]) and torch.equal(
        result.state[3].view(torch.int32), good.state[3].view(torch.int32)
    )


# ---- titans-pytorch ----

LIBRARY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Options of NeuralMemory, and the attributes that they come to.
    "mac": (
        {
            "heads": 2, "dim_head": 8, "chunk_size": 4, "batch_size": 8, "attn_pool_chunks": True, "qk_rmsnorm": True,
            "per_parameter_lr_modulation": True, "default_step_transform_max_lr": 0.1, "spectral_norm_surprises": True,
            "accept_weight_residual": True, "default_model_kwargs": {"depth": 2, "expansion_factor": 2.0},
        },
        {"widths": (8, 16, 8), "activation": "gelu", "batch_size": 8, "orthogonalise": 5, **FAST},
    ),
    "defaults-and-rare-ones": (
        {
            "heads": 2, "dim_head": 8, "chunk_size": 4, "num_kv_per_token": 2, "store_with_lookahead_value": True,
            "max_grad_norm": 0.5, "momentum": False, "default_model_kwargs": {"depth": 3, "expansion_factor": 1.5},
        },
        {
            "widths": (8, 12, 12, 8), "activation": "gelu", "batch_size": 0, "keys_per_token": 2, "lookahead": 1,
            "grad_clamp": 0.5, "momentum_order": 0, **FAST,
        },
    ),
}  # fmt: skip


def _per_head(raw: Tensor, heads: int) -> Tensor:
    """(B, T, heads x rest), head-major, to (B, heads, T, rest)."""
    return raw.unflatten(-1, (heads, -1)).transpose(1, 2)


@targets
@pytest.mark.parametrize("name", LIBRARY)
def test_titans_pytorch_comes_to_the_same(target: Target, name: str, tmp_path: Path) -> None:
    """NeuralMemory.forward in float64; what stands around the operator is projected here, with the module's weights."""
    titans_pytorch = pytest.importorskip("titans_pytorch", reason="optional: pip install '.[bench]'")
    options, changes = LIBRARY[name]
    node = make_node(**changes)
    torch.manual_seed(0)
    length, batch, dim, heads, chunk = 27, 2, 12, options["heads"], 4
    u = options.get("num_kv_per_token", 1)
    memory = titans_pytorch.NeuralMemory(dim, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():  # none is at its initial 0
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).float().double())
        x = torch.randn(batch, length, dim, dtype=torch.float64)
        model = dict(zip(memory.memory_model_parameter_names, memory.memory_model_parameters, strict=True))
        order = [*sorted(n for n in model if n != "norm.gamma"), "norm.gamma"]
        w = torch.cat([model[n].flatten(1) for n in order], -1).expand(batch, -1, -1)
        chunks = length // chunk
        others = w[:, :, None] * torch.rand(1, 1, chunks + 1, 1, dtype=torch.float64)
        given = {}
        if options.get("accept_weight_residual"):
            parts = split(node, others.flatten(0, 1))
            given["prev_weights"] = titans_pytorch.neural_memory.TensorDict(dict(zip(order, parts, strict=True)))
        retrieved, state = memory(x, **given)
        store, retrieve = memory.store_norm(x), memory.retrieve_norm(x)
        q = memory.q_norm(memory.split_heads(memory.to_queries(retrieve)))
        k = memory.k_norm(memory.split_kv_heads(memory.to_keys(store)))
        v = memory.split_kv_heads(memory.to_values(store))
        theta = memory.adaptive_step_transform(memory.to_adaptive_step(store)).reshape(batch, heads, length * u)
        pooled = memory.reduce_to_chunk_rep(store[:, : chunks * chunk], chunk_size=chunk)

        def of_token(gate: Tensor) -> Tensor:
            """A chunk's gate (B, H, chunks, ...) where it counts; elsewhere anything that is a number."""
            out = torch.rand(batch, heads, length, *gate.shape[3:], dtype=torch.float64) * 9
            out[:, :, chunk - 1 : chunks * chunk : chunk] = gate
            return out

        call = {"q": q, "k": k, "v": v, "step_size": theta, "fill": torch.zeros(batch, dtype=torch.int64)}
        decay = memory.to_decay_factor[0](pooled).sigmoid()
        call["forget_gate"] = of_token(_per_head(decay, heads)[..., 0])
        if memory.to_momentum is not None:
            call["momentum"] = of_token(_per_head(memory.to_momentum[0](pooled).sigmoid(), heads)[..., 0])
        if memory.to_layer_modulation is not None:
            modulation = _per_head(memory.to_layer_modulation[0](pooled).sigmoid(), heads)
            places = [memory.memory_model_parameter_names.index(n) for n in order]
            call["modulation"] = of_token(modulation[..., places])
        if memory.to_learned_weight_residual_mix is not None:
            call["previous_gate"] = of_token(memory.to_learned_weight_residual_mix(pooled))
            call["previous"] = others
        result = run_node(target, tmp_path, node, fresh_rows(node, w), [call], ("--initial-weights",))
        y = result.y[0].double() * memory.retrieve_gate(retrieve)
        y = memory.combine_heads(memory.merge_heads(y))
    tolerance = ORTHOGONAL if option(node, "orthogonalise") else TOLERANCE
    assert worst((y, retrieved)) < tolerance
    last, momentum = state.states
    fields = unpack(node, result.state.double())
    expected = torch.cat([last[n].flatten(1) for n in order], -1).reshape_as(fields["W"])
    assert worst((fields["W"], expected)) < tolerance
    point = torch.cat([state.weights[n].flatten(1).expand(batch * heads, -1) for n in order], -1).reshape_as(expected)
    assert worst((fields["G"], point)) < tolerance
    if "S" in fields:
        s = torch.cat([momentum[n][0].flatten(1) for n in order], -1).reshape_as(expected)
        assert worst((fields["S"], s)) < tolerance
    updates = torch.cat([state.updates[n].flatten(2) for n in order], -1).unflatten(0, (batch, heads))
    assert worst((result.initial_weights[0][:, :, :chunks].double(), updates[:, :, :chunks])) < tolerance


# ---- ONNX Runtime ----


def _feeds(case: ChunkCase, aligned: bool = False) -> Arrays:
    tensors = {"state": case.rows(), **case.call(0, case.length, aligned)}
    return {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in tensors.items()}


def _before_shape(case: ChunkCase) -> tuple[int, ...]:
    return (case.streams, case.heads, -(-case.length // case.node["chunk_size"]), case.weights.shape[-1])


@pytest.mark.parametrize("name", ["mac", "keys-2-lookahead", "momentum-0", "batch-2", "clamp", "norm-slow"])
@pytest.mark.parametrize("before", [True, False], ids=["initial_weights", "no-initial_weights"])
def test_a_node_computes_the_equations(name: str, before: bool) -> None:
    case = _case(name)
    feeds = _feeds(case)
    model = make_model(feeds, case.node, initial_weights=_before_shape(case) if before else None)
    y, state, stats, *more = (torch.from_numpy(x) for x in make_session(model).run(None, feeds))
    result = Result([y], [stats], state, "", [*more])
    _expect(case, result, [case.length] * before, _tolerance(case))


def test_a_node_goes_on_from_its_state_in_place() -> None:
    case = _case("mac")
    feeds = _feeds(case)
    session = make_session(make_model(feeds, case.node))
    state = feeds["state"].copy()
    binding = session.io_binding()
    for name, value in feeds.items():
        address = state.ctypes.data if name == "state" else value.ctypes.data
        binding.bind_input(name, "cpu", 0, value.dtype, value.shape, address)
    binding.bind_output("state_out", "cpu", 0, np.float32, state.shape, state.ctypes.data)
    binding.bind_output("y")
    binding.bind_output("stats")
    session.run_with_iobinding(binding)
    expected = session.run(["state_out"], feeds)[0]
    assert np.array_equal(np.nan_to_num(state), np.nan_to_num(expected))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 6}, "contradicting attributes: batch_size must be 0 or a multiple of chunk_size 4, got 6"),
        ({"batch_size": 8.0}, "invalid attribute batch_size: wrong type"),
        ({"loss_scale": 1}, "invalid attribute loss_scale: wrong type"),
        ({"loss_scale": 0.0}, "invalid attribute loss_scale: expected a finite number above 0"),
        ({"norm_weight": "fast"}, 'contradicting attributes: norm_weight "fast" needs layer_norm 1, got 0'),
        ({"schedule": "some"}, 'invalid attribute schedule: expected "aligned" or "any", got "some"'),
    ],
)
def test_wrong_attributes_are_refused_when_the_model_is_loaded(change: dict[str, Any], words: str) -> None:
    case = _case("mlp2")
    with pytest.raises(Exception, match=rf"\[ChunkNeuralMemory\] {words}.*\. Fix: export the model again"):
        make_session(make_model(_feeds(case), case.node | change))


def test_initial_weights_is_an_output_of_this_operator_alone() -> None:
    case = _case("mlp2")
    feeds = _feeds(case)
    model = onnx.load_from_string(make_model(feeds, case.node, initial_weights=_before_shape(case)))
    make_session(model.SerializeToString())
    [node] = model.graph.node
    node.op_type = "NeuralMemory"
    with pytest.raises(Exception, match=r"NeuralMemory.*output"):
        make_session(model.SerializeToString())


def test_flat_weights_split_as_they_were_joined() -> None:
    """The oracle's own."""
    node = make_node(widths=(3, 5, 3), **FAST)
    values = torch.arange(33.0)
    assert torch.equal(flat(split(node, values)), values)
