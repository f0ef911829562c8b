"""The kernels, for every instruction set and GPU, against the equations with autograd in float64 (oracles.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import KINDS, Case, random_cuts, worst
from kernel_runner import Target, cpu_targets, run_kernel, targets
from oracles import network, titans_stream
from torch import Tensor

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import STATS, initial_rows, memory_layout, neural_memory_update

GATES = ("step_size", "momentum", "forget_gate")

# The memory kinds of the other tests, and sizes that meet every edge of tiles and vectors.
SHAPES = {
    **{name: (spec, 43) for name, spec in KINDS.items()},
    "chunk-1": (replace(KINDS["mlp2-silu"], chunk_size=1), 5),
    "chunk-7": (replace(KINDS["mlp2-residual"], chunk_size=7), 30),
    "chunk-33": (replace(KINDS["mlp3-silu"], chunk_size=33), 80),
    "width-1": (MemorySpec((1, 3, 1), chunk_size=4), 11),
    "linear-17": (MemorySpec((17, 17), chunk_size=16), 40),
    "linear-64": (MemorySpec((64, 64), chunk_size=64), 150),
    "mlp-64-256-64": (MemorySpec((64, 256, 64), chunk_size=64), 150),
    "mlp-31-67-31-gelu-residual-norm": (MemorySpec((31, 67, 31), "gelu", True, True, chunk_size=20), 50),
    "mlp-48-100-33-48-norm": (MemorySpec((48, 100, 33, 48), "silu", False, True, chunk_size=24), 60),
}
shapes = pytest.mark.parametrize("name", SHAPES)


@cache
def _case(name: str, length: int | None = None, edges: bool = False) -> Case:
    spec, default = SHAPES[name]
    case = Case(spec, length or default, edges=edges)
    if spec.layer_norm:  # smaller steps than elsewhere: float64 forms drift less than float32 ones
        case.step_size *= 0.1
    return case


def _calls(case: Case, cuts: list[int]) -> list[dict[str, Tensor]]:
    """The stream in calls of the given lengths, for schedule "any"."""
    calls, at = [], 0
    for cut in cuts:
        part = slice(at, at + cut)
        call = {name: x[..., part, :] for name, x in zip("qkv", (case.q, case.k, case.v), strict=True)}
        call |= {name: gate[..., part] for name, gate in zip(GATES, case.gates, strict=True)}
        call["fill"] = torch.full((case.streams,), at % case.spec.chunk_size)
        if case.norm_scale is not None:
            call["norm_scale"] = case.norm_scale
        calls.append(call)
        at += cut
    return calls


@cache
def _oracle(case: Case, b: int, h: int, length: int | None = None) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    scale = None if case.norm_scale is None else case.norm_scale[h]
    inputs = [x[b, h, :length] for x in (case.q, case.k, case.v, *case.gates)]
    return titans_stream(case.spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)


@pytest.mark.sample(4)
@targets
@shapes
@pytest.mark.parametrize("edges", [False, True], ids=["gates-inside", "gates-0-and-1"])
def test_any_cut_equals_the_recurrence(target: Target, name: str, edges: bool, tmp_path: Path) -> None:
    case = _case(name, edges=edges)
    spec, length = case.spec, case.length
    rows = initial_rows(spec, case.weights)
    cuts = {"whole": [length], "tokens": [1] * length, "random": random_cuts(length, seed=1)}
    results = {way: run_kernel(target, tmp_path, spec, rows, _calls(case, cut)) for way, cut in cuts.items()}
    for b in range(case.streams):
        for h in range(case.heads):
            y, _, _, loss = _oracle(case, b, h)
            for way, result in results.items():
                assert worst((torch.cat(result.y, 2)[b, h].double(), y)) < target.tolerance, way
                stats = torch.stack(result.stats)[:, b, h]
                assert stats[:, 0].sum().item() == pytest.approx(loss.sum().item(), rel=target.tolerance)
                assert stats[:, 2].sum() == length // spec.chunk_size
                assert stats[:, 3].sum() == 0


@targets
@shapes
def test_whole_chunks_leave_w_and_s_of_the_recurrence(target: Target, name: str, tmp_path: Path) -> None:
    spec, _ = SHAPES[name]
    case = _case(name, 2 * spec.chunk_size)
    rows = initial_rows(spec, case.weights)
    [whole] = [{key: value for key, value in call.items() if key != "fill"} for call in _calls(case, [case.length])]
    for result in (
        run_kernel(target, tmp_path, spec, rows, [whole], aligned=True),
        run_kernel(target, tmp_path, spec, rows, _calls(case, [1] * case.length)),
    ):
        fields = memory_layout(spec).unpack(result.state.double())
        norms = []
        for b in range(case.streams):
            for h in range(case.heads):
                _, half, _, _ = _oracle(case, b, h, spec.chunk_size)
                _, w, s, _ = _oracle(case, b, h)
                for i in range(spec.depth):
                    assert worst((fields[f"W{i}"][b, h], w[i]), (fields[f"S{i}"][b, h], s[i])) < target.tolerance
                first = [a - b for a, b in zip(half, (x[b, h] for x in case.weights), strict=True)]
                second = [a - b for a, b in zip(w, half, strict=True)]
                norms.append(max(math.sqrt(sum(float((x * x).sum()) for x in part)) for part in (first, second)))
        found = torch.stack(result.stats)[..., STATS.index("update_norm")].amax(0).flatten()
        assert found.tolist() == pytest.approx(norms, rel=target.tolerance)
        assert all(float(fields[name].abs().max()) == 0 for name in ("e", "a", "f"))
        assert bool((fields["m"] == 1).all() and (fields["beta"] == 1).all())


@targets
@shapes
def test_read_mode_answers_from_the_chunk_start(target: Target, name: str, tmp_path: Path) -> None:
    case = _case(name)
    spec, length = case.spec, case.length
    rows = initial_rows(spec, case.weights)
    state = run_kernel(target, tmp_path, spec, rows, _calls(case, [length])).state
    fields = memory_layout(spec).unpack(state.double())
    pool = torch.cat([torch.full_like(state, math.nan), state])
    scale = {} if case.norm_scale is None else {"norm_scale": case.norm_scale}
    for size in (1, 2, length):  # a single token goes another way than several
        q = case.q[..., :size, :]
        calls = [{"q": q, "slots": torch.tensor([2, 3]), **scale}]
        result = run_kernel(target, tmp_path, spec, pool, calls, mode="read")
        assert torch.equal(result.state[2:], state)
        for b in range(case.streams):
            for h in range(case.heads):
                w = [fields[f"W{i}"][b, h] for i in range(spec.depth)]
                expected = network(spec, w, q[b, h], None if case.norm_scale is None else case.norm_scale[h])
                assert worst((result.y[0][b, h].double(), expected)) < target.tolerance


@targets
def test_streams_of_one_call_may_stand_anywhere_in_their_chunks(target: Target, tmp_path: Path) -> None:
    """Ragged rows in chosen slots of a pool: each stream as if alone, padding may hold NaN, other rows untouched."""
    spec = KINDS["mlp2-gelu"]
    case = Case(spec, length=30, streams=3)
    slots = torch.tensor([4, 0, 2])
    pool = torch.randn(6, case.heads, memory_layout(spec).size, dtype=torch.float64)
    before = pool.float()
    pool[slots] = initial_rows(spec, case.weights)
    done, counts = [0, 0, 0], [[5, 1, 0], [3, 4, 2], [0, 4, 1], [4, 0, 4], [4, 4, 4], [2, 3, 4]]
    calls: list[dict[str, Tensor]] = []
    for valid in counts:
        call = {"fill": torch.tensor([d % spec.chunk_size for d in done]), "valid": torch.tensor(valid), "slots": slots}
        for name, x in zip(("q", "k", "v", *GATES), (case.q, case.k, case.v, *case.gates), strict=True):
            padded = torch.full((3, case.heads, max(valid), *x.shape[3:]), math.nan, dtype=torch.float64)
            for b, n in enumerate(valid):
                padded[b, :, :n] = x[b, :, done[b] : done[b] + n]
            call[name] = padded
        calls.append(call)
        done = [d + n for d, n in zip(done, valid, strict=True)]
    result = run_kernel(target, tmp_path, spec, pool, calls)
    others = [1, 3, 5]
    assert torch.equal(result.state[others], before[others])
    for b in range(3):
        y = torch.cat([part[b, :, : valid[b]] for part, valid in zip(result.y, counts, strict=True)], 1)
        assert all(not part[b, :, valid[b] :].any() for part, valid in zip(result.y, counts, strict=True))
        for h in range(case.heads):
            assert worst((y[h].double(), _oracle(case, b, h, done[b])[0])) < target.tolerance


@targets
def test_freezing_midway_holds_the_memory_and_resuming_goes_on(target: Target, tmp_path: Path) -> None:
    spec = KINDS["mlp3-silu"]
    cuts = [7, 4, 1, 1, 14, 3, 7]  # one token, several, a whole chunk and more of it frozen
    learning = [True, True, False, False, False, True, True]
    case = Case(spec, length=sum(cuts))
    calls = _calls(case, cuts)
    for call, learn in zip(calls, learning, strict=True):
        call["learn"] = torch.tensor([learn, True])
        if not learn:  # what a frozen stream is told does not matter
            call["k"] = call["k"].clone()
            call["k"][0] = math.nan
    result = run_kernel(target, tmp_path, spec, initial_rows(spec, case.weights), calls)
    y = torch.cat(result.y, 2).double()
    learn = [on for on, cut in zip(learning, cuts, strict=True) for _ in range(cut)]
    for h in range(case.heads):
        for b, flags in ((0, learn), (1, None)):
            inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
            expected, *_ = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, learn=flags)
            assert worst((y[b, h], expected)) < target.tolerance


@targets
def test_a_frozen_chunk_leaves_every_bit(target: Target, tmp_path: Path) -> None:
    spec = KINDS["mlp2-silu"]
    case = Case(spec, length=16)
    rows = run_kernel(target, tmp_path, spec, initial_rows(spec, case.weights), _calls(case, [16])).state
    for cuts in ([16], [1] * 16, [3, 5, 8]):
        calls = _calls(case, cuts)
        for call in calls:
            call["learn"] = torch.tensor([False, False])
        after = memory_layout(spec).unpack(run_kernel(target, tmp_path, spec, rows, calls).state)
        before = memory_layout(spec).unpack(rows)
        assert all(torch.equal(after[name], before[name]) for name in ("W0", "W1", "S0", "S1"))


@targets
@pytest.mark.parametrize("way", ["aligned", "tokens", "blocks"])
@pytest.mark.parametrize("memory_dtype", ["float32", "bfloat16"])
def test_guard_drops_a_chunk_that_is_too_large_or_not_a_number(
    target: Target, way: str, memory_dtype: str, tmp_path: Path
) -> None:
    spec = KINDS["mlp2-silu"]
    case = Case(spec, length=3 * spec.chunk_size, streams=3)
    case.v[1, :, 8:16] *= 1e6  # stream 1: its second chunk explodes
    case.v[2, 0, 12] = math.nan  # stream 2: its second chunk is poisoned in head 0
    cuts = {"aligned": [case.length], "tokens": [1] * case.length, "blocks": [3, 7, 6, 2, 6]}
    calls = _calls(case, cuts[way])
    for call in calls:
        call["update_limit"] = torch.full((3,), 100.0)
        if way == "aligned":
            del call["fill"]
    rows = _packed(spec, case, memory_dtype)
    result = run_kernel(target, tmp_path, spec, rows, calls, aligned=way == "aligned", memory_dtype=memory_dtype)
    total = torch.stack(result.stats).sum(0)
    committed, rejected = (total[..., STATS.index(name)] for name in ("committed", "rejected"))
    assert committed.tolist() == [[3, 3, 3], [2, 2, 2], [2, 3, 3]]
    assert (committed + rejected == 3).all()
    fields = memory_layout(spec).unpack(result.state) if memory_dtype == "float32" else _unpacked(spec, result.state)
    assert all(torch.isfinite(fields[name]).all() for name in ("W0", "W1", "S0", "S1"))
    norms = torch.stack(result.stats)[..., STATS.index("update_norm")]
    assert torch.isfinite(norms[:, 0]).all()
    assert bool((norms[:, 1].amax(0) > 100).all()), "the norm of what was dropped is told"
    if memory_dtype == "float32":
        # What was dropped is as if it had never been learned, so the third chunk goes on from the first.
        kept = {name: x[1, 0, [*range(8), *range(16, 24)]] for name, x in _named(case).items()}
        _, w, _, _ = titans_stream(spec, [x[1, 0] for x in case.weights], **kept)
        assert worst(*((fields[f"W{i}"][1, 0].double(), w[i]) for i in range(spec.depth))) < target.tolerance


@targets
def test_aligned_calls_stop_at_the_last_valid_chunk(target: Target, tmp_path: Path) -> None:
    spec = KINDS["mlp2-silu"]
    case = Case(spec, length=3 * spec.chunk_size, streams=3)
    [call] = _calls(case, [case.length])
    del call["fill"]
    valid = [spec.chunk_size, 0, 3 * spec.chunk_size]
    call["valid"] = torch.tensor(valid)
    for name in ("q", "k", "v", *GATES):
        call[name] = call[name].clone()
        for b, n in enumerate(valid):
            call[name][b, :, n:] = math.nan
    rows = initial_rows(spec, case.weights)
    result = run_kernel(target, tmp_path, spec, rows, [call], aligned=True)
    assert torch.equal(result.state[1], rows[1].float())
    assert result.stats[0][..., STATS.index("committed")].tolist() == [[1] * 3, [0] * 3, [3] * 3]
    for b, n in enumerate(valid):
        assert not result.y[0][b, :, n:].any()
        for h in range(case.heads if n else 0):
            assert worst((result.y[0][b, h, :n].double(), _oracle(case, b, h, n)[0])) < target.tolerance


def _named(case: Case) -> dict[str, Tensor]:
    return dict(zip(("q", "k", "v", *GATES), (case.q, case.k, case.v, *case.gates), strict=True))


def _packed(spec: MemorySpec, case: Case, memory_dtype: str) -> Tensor:
    """Rows of a fresh memory; in bfloat16 two values share a word, the first in its lower half (little endian)."""
    rows = initial_rows(spec, case.weights).float()
    if memory_dtype == "float32":
        return rows
    fields = memory_layout(spec).unpack(rows)
    parts = []
    for field in memory_layout(spec).fields:
        flat = fields[field.name].reshape(*rows.shape[:-1], -1)
        if field.name[0] in "WS":
            flat = torch.nn.functional.pad(flat, (0, flat.shape[-1] % 2)).to(torch.bfloat16).contiguous()
            flat = flat.view(torch.float32)
        parts.append(flat)
    packed = torch.cat(parts, -1)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 16))


def _unpacked(spec: MemorySpec, state: Tensor) -> dict[str, Tensor]:
    """W and S of rows in bfloat16."""
    out, at = {}, 0
    for name, shape in [(f"{letter}{i}", s) for letter in "WS" for i, s in enumerate(spec.shapes)]:
        count = shape[0] * shape[1]
        words = state[..., at : at + (count + 1) // 2].contiguous()
        out[name] = words.view(torch.bfloat16)[..., :count].reshape(*state.shape[:-1], *shape)
        at += (count + 1) // 2
    return out


@targets
@pytest.mark.parametrize("name", ["linear", "mlp2-norm", "mlp3-silu", "linear-17", "mlp-64-256-64"])
def test_bfloat16_memory_dtype_rounds_at_the_end_of_each_chunk_and_nowhere_else(
    target: Target, name: str, tmp_path: Path
) -> None:
    """The oracle: the reference chunk by chunk in float64, W and S rounded to bfloat16 in between by PyTorch."""
    spec, _ = SHAPES[name]
    case = Case(spec, length=3 * spec.chunk_size, streams=1)
    fields = memory_layout(spec).unpack(initial_rows(spec, case.weights))
    expected = []
    for chunk in range(4):
        for field in fields:
            if field[0] in "WS":
                fields[field] = fields[field].float().to(torch.bfloat16).double()
        if chunk == 3:
            break
        part = slice(chunk * spec.chunk_size, (chunk + 1) * spec.chunk_size)
        inputs = [x[..., part, :] for x in (case.q, case.k, case.v)] + [gate[..., part] for gate in case.gates]
        update = neural_memory_update(spec, memory_layout(spec).pack(fields), *inputs, norm_scale=case.norm_scale)
        expected.append(update.y)
        fields = memory_layout(spec).unpack(update.state)
    packed = _packed(spec, case, "bfloat16")
    for cuts in ([case.length], [1] * case.length, random_cuts(case.length, seed=2)):
        result = run_kernel(target, tmp_path, spec, packed, _calls(case, cuts), memory_dtype="bfloat16")
        # A value that float32 and float64 round to neighbours differs by one step of bfloat16, 2^-8.
        y = torch.cat(result.y, 2).double()
        assert worst((y[:, :, : spec.chunk_size], expected[0])) < target.tolerance
        assert worst((y, torch.cat(expected, 2))) < 2**-8
        for field, value in _unpacked(spec, result.state).items():
            assert worst((value.double(), fields[field])) < 2**-7, field
            same = (value.double() == fields[field]).double().mean()
            assert same > 0.9, f"{field}: {same:.3f} equal"


@targets
@pytest.mark.parametrize(
    "name", ["mlp-31-67-31-gelu-residual-norm", "linear-64"]
)  # the latter copied 16 bytes at a time
def test_threads_and_buffers_change_no_bit(target: Target, name: str, tmp_path: Path) -> None:
    spec, length = SHAPES[name]
    case = Case(spec, length, streams=2, heads=3)
    rows, calls = initial_rows(spec, case.weights), _calls(case, random_cuts(length, seed=3))
    one = run_kernel(target, tmp_path, spec, rows, calls)
    for options in target.harmless_options:
        other = run_kernel(target, tmp_path, spec, rows, calls, options=options)
        assert torch.equal(one.state, other.state), options
        assert all(torch.equal(a, b) for a, b in zip(one.y + one.stats, other.y + other.stats, strict=True)), options


@targets
def test_activations_hold_over_the_whole_range(target: Target, tmp_path: Path) -> None:
    """Read mode of an MLP 1-1-1 with weights 1 is the activation itself."""
    z = torch.cat([torch.linspace(-120, 120, 2001), torch.linspace(-4, 4, 2001), torch.tensor([0.0, 1e-30, -1e-30])])
    for activation, exact in (("silu", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu)):
        spec = MemorySpec((1, 1, 1), activation, chunk_size=len(z))
        rows = initial_rows(spec, [torch.ones(1, 1, 1, 1)] * 2)
        result = run_kernel(target, tmp_path, spec, rows, [{"q": z[None, None, :, None]}], mode="read")
        error = (result.y[0].flatten().double() - exact(z.double())).abs()
        # Where GELU has a tail, an exponent of 15 is rounded before it is raised: 15 * 2^-24.
        assert float((error / (1e-6 + exact(z.double()).abs())).max()) < 2e-6
        poisoned = run_kernel(target, tmp_path, spec, rows, [{"q": torch.full((1, 1, 3, 1), math.nan)}], mode="read")
        assert torch.isnan(poisoned.y[0]).all()


@pytest.mark.parametrize("target", cpu_targets())
def test_a_memory_that_decays_has_no_subnormal_numbers(target: Target, tmp_path: Path) -> None:
    """Processors compute with those many times slower. What becomes zero is at most 2^-126 away."""
    least = torch.finfo(torch.float32).tiny
    spec = SHAPES["linear-17"][0]
    case = _case("linear-17", 2 * spec.chunk_size)
    [call] = _calls(case, [case.length])
    call |= {"step_size": torch.zeros_like(case.step_size), "forget_gate": torch.full_like(case.forget_gate, 0.5)}
    sizes = torch.tensor([1e-20, 1e-30]).repeat(9)[:17]
    weights = [torch.randn(w.shape).sign() * sizes for w in case.weights]
    result = run_kernel(target, tmp_path, spec, initial_rows(spec, weights), [call])
    fields = memory_layout(spec).unpack(result.state)
    got = fields["W0"]
    exact = weights[0].double() * 0.5**case.length
    assert bool(((exact.abs() < least) & (exact != 0)).any() and (exact.abs() > least).any())
    assert float((got.double() - exact).abs().max()) < max(least, 1e-5 * float(exact.abs().max()))
    assert bool(((got == 0) | (got.abs() >= least)).all())
    assert bool((got != 0).any())


def test_a_target_of_another_machine_is_refused(tmp_path: Path) -> None:
    parameters = [p for p in targets.args[1] if p.id == "plain"]
    if parameters[0].marks:
        pytest.skip("neural_memory_run is not built: make kernels")
    spec = KINDS["linear"]
    case = Case(spec, length=8)
    command = parameters[0].values[0].command
    with pytest.raises(RuntimeError, match=r"\[NeuralMemory\] not supported on .*, got sse9\. Fix: set"):
        target = Target("sse9", command, ("--target", "sse9"))
        run_kernel(target, tmp_path, spec, initial_rows(spec, case.weights), _calls(case, [8]))
