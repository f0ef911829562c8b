"""The operator's reference: packed rows, every option of docs/operator.md, against the autograd recurrence."""

from __future__ import annotations

import math

import pytest
import torch
from cases import KINDS, TOLERANCE_FLOAT64, Case, kinds, random_cuts, worst
from oracles import network, titans_stream
from torch import Tensor

from titans_export.model.memory import MemorySpec
from titans_export.model.memory_dtype import ROW_ALIGNMENT
from titans_export.model.neural_memory import (
    STATS,
    initial_rows,
    memory_layout,
    neural_memory_read,
    neural_memory_update,
)


def _feed(case: Case, cuts: list[int], learn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, final rows and summed stats of a stream fed in the given cuts, whole chunks through the aligned schedule."""
    spec, rows, at, out, stats = case.spec, initial_rows(case.spec, case.weights), 0, [], []
    for cut in cuts:
        end = at + cut
        while at < end:
            aligned = at % spec.chunk_size == 0 and end - at >= spec.chunk_size
            size = (end - at) // spec.chunk_size * spec.chunk_size if aligned else 1
            part = slice(at, at + size)
            fill = None if aligned else torch.full((case.streams,), at % spec.chunk_size)
            result = neural_memory_update(
                spec,
                rows,
                *(x[..., part, :] for x in (case.q, case.k, case.v)),
                *(g[..., part] for g in case.gates),
                fill=fill,
                learn=learn,
                norm_scale=case.norm_scale,
            )
            rows = result.state
            out.append(result.y)
            stats.append(result.stats)
            at += size
    return torch.cat(out, -2), rows, torch.stack(stats)


def test_layout_covers_the_row_without_gaps() -> None:
    for spec in KINDS.values():
        layout, end = memory_layout(spec), 0
        for field in layout.fields:
            assert field.offset == end
            end += math.prod(field.shape)
        assert layout.size % ROW_ALIGNMENT == 0
        assert end <= layout.size < end + ROW_ALIGNMENT
        rows = torch.randn(2, 3, layout.size)
        rows[..., end:] = 0
        assert torch.equal(layout.pack(layout.unpack(rows)), rows)


@kinds
@pytest.mark.parametrize("edges", [False, True], ids=["gates-inside", "gates-0-and-1"])
def test_any_cut_equals_the_recurrence(spec: MemorySpec, edges: bool) -> None:
    length = 43
    case = Case(spec, length, edges=edges)
    ways = {"whole": [length], "tokens": [1] * length, "random": random_cuts(length, seed=0)}
    results = {name: _feed(case, way) for name, way in ways.items()}
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
            y, _, _, loss = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
            for way, (got, _, stats) in results.items():
                assert worst((got[b, h], y)) < TOLERANCE_FLOAT64, way
                assert torch.allclose(stats[:, b, h, 0].sum(), loss.sum(), rtol=1e-10)
                assert stats[:, b, h, 2].sum() == length // spec.chunk_size


@kinds
def test_state_after_whole_chunks_is_w_and_s_of_the_recurrence(spec: MemorySpec) -> None:
    case = Case(spec, length=3 * spec.chunk_size)
    for cuts in ([case.length], [1] * case.length):
        fields = memory_layout(spec).unpack(_feed(case, cuts)[1])
        for b in range(case.streams):
            for h in range(case.heads):
                scale = None if case.norm_scale is None else case.norm_scale[h]
                inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
                _, w, s, _ = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
                for i in range(spec.depth):
                    assert worst((fields[f"W{i}"][b, h], w[i]), (fields[f"S{i}"][b, h], s[i])) < TOLERANCE_FLOAT64
        assert float(fields["e"].abs().max()) == float(fields["a"].abs().max()) == float(fields["f"].abs().max()) == 0
        assert torch.equal(fields["m"], torch.ones_like(fields["m"]))


def test_freezing_midway_holds_the_memory_and_resuming_goes_on() -> None:
    spec = KINDS["mlp2-silu"]
    learn = [True] * 11 + [False] * 16 + [True] * 10
    case = Case(spec, length=len(learn))
    on, off = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    rows, out = initial_rows(spec, case.weights), []
    for t, learning in enumerate(learn):
        result = neural_memory_update(
            spec,
            rows,
            *(x[..., t : t + 1, :] for x in (case.q, case.k, case.v)),
            *(g[..., t : t + 1] for g in case.gates),
            fill=torch.full((2,), t % spec.chunk_size),
            learn=on if learning else off,
        )
        rows = result.state
        out.append(result.y)
    y = torch.cat(out, -2)
    inputs = [x[1, 2] for x in (case.q, case.k, case.v, *case.gates)]
    expected, w, _, _ = titans_stream(spec, [x[1, 2] for x in case.weights], *inputs, learn=learn)
    assert worst((y[1, 2], expected)) < TOLERANCE_FLOAT64
    # The stream ends inside a chunk: what the frozen chunk in the middle left is W of the last complete chunk.
    frozen = neural_memory_update(
        spec, rows, *(x[..., :8, :] for x in (case.q, case.k, case.v)), *(g[..., :8] for g in case.gates), learn=off
    )
    same = memory_layout(spec).unpack(frozen.state)
    before = memory_layout(spec).unpack(rows)
    assert torch.equal(same["W0"], before["W0"])
    assert torch.equal(same["S1"], before["S1"])
    assert len(w) == 2


def test_streams_of_one_call_may_stand_anywhere_in_their_chunks() -> None:
    """Ragged rows: one call serves streams with different fill and valid, in chosen slots of a pool, each as if
    alone.
    """
    spec = KINDS["mlp2-gelu"]
    case = Case(spec, length=30, streams=3)
    slots, pool_size = torch.tensor([4, 0, 2]), 6
    pool = torch.randn(pool_size, case.heads, memory_layout(spec).size, dtype=torch.float64)
    untouched = pool.clone()
    pool[slots] = initial_rows(spec, case.weights)
    done, counts = [0, 0, 0], [[5, 1, 0], [3, 4, 2], [0, 4, 1], [4, 0, 4], [4, 4, 4], [2, 3, 4]]
    out: list[list[Tensor]] = [[], [], []]
    for valid in counts:
        width = max(valid)
        index = [[min(d + i, case.length - 1) for i in range(width)] for d in done]
        pick = torch.tensor(index)[:, None, :].expand(-1, case.heads, -1)

        def rows(x: Tensor, pick: Tensor = pick) -> Tensor:
            return x.gather(2, pick.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

        padding = torch.arange(width) >= torch.tensor(valid).unsqueeze(-1)
        padded = [rows(x).masked_fill(padding[:, None, :, None], math.nan) for x in (case.q, case.k, case.v)]
        result = neural_memory_update(
            spec,
            pool,
            *padded,
            *(g.gather(2, pick) for g in case.gates),
            fill=torch.tensor([d % spec.chunk_size for d in done]),
            valid=torch.tensor(valid),
            slots=slots,
        )
        pool = result.state
        for b, n in enumerate(valid):
            out[b].append(result.y[b, :, :n])
            done[b] += n
    others = [i for i in range(pool_size) if i not in slots.tolist()]
    assert torch.equal(pool[others], untouched[others])
    for b in range(3):
        y = torch.cat(out[b], 1)
        for h in range(case.heads):
            inputs = [x[b, h, : done[b]] for x in (case.q, case.k, case.v, *case.gates)]
            expected, *_ = titans_stream(spec, [x[b, h] for x in case.weights], *inputs)
            assert worst((y[h], expected)) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("way", ["aligned", "tokens"])
def test_guard_drops_a_chunk_that_is_too_large_or_not_a_number(way: str) -> None:
    spec = KINDS["linear"]
    case = Case(spec, length=3 * spec.chunk_size, streams=3)
    case.v[1, :, 8:16] *= 1e6  # stream 1: its second chunk explodes
    case.v[2, 0, 12] = math.nan  # stream 2: its second chunk is poisoned in head 0
    cuts = [case.length] if way == "aligned" else [1] * case.length
    rows, total = initial_rows(spec, case.weights), []
    at = 0
    for cut in cuts:
        part = slice(at, at + cut)
        result = neural_memory_update(
            spec,
            rows,
            *(x[..., part, :] for x in (case.q, case.k, case.v)),
            *(g[..., part] for g in case.gates),
            fill=None if way == "aligned" else torch.full((3,), at % spec.chunk_size),
            update_limit=torch.full((3,), 100.0, dtype=torch.float64),
        )
        rows = result.state
        total.append(result.stats)
        at += cut
    stats = torch.stack(total)
    committed, rejected = stats[..., STATS.index("committed")].sum(0), stats[..., STATS.index("rejected")].sum(0)
    assert committed.tolist() == [[3, 3, 3], [2, 2, 2], [2, 3, 3]]
    assert (committed + rejected == 3).all()
    assert torch.isfinite(rows).all()


@kinds
def test_read_mode_answers_from_the_chunk_start(spec: MemorySpec) -> None:
    case = Case(spec, length=21)
    rows = _feed(case, [21])[1]
    got = neural_memory_read(spec, rows, case.q, norm_scale=case.norm_scale)
    slotted = neural_memory_read(
        spec, torch.cat([torch.zeros_like(rows), rows]), case.q, torch.tensor([2, 3]), case.norm_scale
    )
    assert torch.equal(got, slotted)
    start = 21 // spec.chunk_size * spec.chunk_size
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[b, h, :start] for x in (case.q, case.k, case.v, *case.gates)]
            _, w, _, _ = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
            assert worst((got[b, h], network(spec, w, case.q[b, h], scale))) < TOLERANCE_FLOAT64


def test_aligned_calls_count_only_the_chunks_that_are_valid() -> None:
    spec = KINDS["linear"]
    case = Case(spec, length=3 * spec.chunk_size, streams=2)
    valid = torch.tensor([1, 3]) * spec.chunk_size
    for x in (case.q, case.k, case.v):
        x[0, :, spec.chunk_size :] = math.nan
    rows = initial_rows(spec, case.weights)
    result = neural_memory_update(spec, rows, case.q, case.k, case.v, *case.gates, valid=valid)
    assert result.stats[..., STATS.index("committed")].tolist() == [[1, 1, 1], [3, 3, 3]]
    assert (result.stats[..., STATS.index("rejected")] == 0).all()
    alone = [x[:1, ..., : spec.chunk_size, :] for x in (case.q, case.k, case.v)]
    short = neural_memory_update(spec, rows[:1], *alone, *(g[:1, :, : spec.chunk_size] for g in case.gates))
    assert worst((result.state[:1], short.state), (result.stats[:1], short.stats)) < TOLERANCE_FLOAT64
