"""W and S in fewer bits, on the CPU's kernel for every instruction set: where float32 is exact by the very rule of
docs/operator.md (memory_dtype_oracle.py), elsewhere against autograd in float64 with that rule in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, random_cuts, worst
from chunk_oracle import ChunkCase, make_node, option, split, weight_shapes
from kernel_runner import Target, cpu_targets, cuda_targets, operator_of, run_node
from memory_dtype_oracle import (
    BLOCK,
    LARGEST,
    MEMORY_DTYPES,
    ROUNDINGS,
    Elements,
    Kept,
    decode,
    encode,
    field_words,
    flushed,
    magnitudes,
    round_field,
    uniforms,
)
from oracles import network as token_network
from tolerances import TOLERANCES
from torch import Tensor

from titans_export.errors import TitansError
from titans_export.model import memory_dtype as packing
from titans_export.model.chunk_update import ChunkMemorySpec, chunk_layout
from titans_export.model.fast_networks import NetworkSpec
from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import memory_layout
from titans_export.model.packed_row import Layout
from titans_export.operators import CHUNK_NEURAL_MEMORY
from titans_export.row_fields import RowField

targets = pytest.mark.parametrize("target", cpu_targets())
TOLERANCE = TOLERANCES["cpu-kernel", "float32"]
# A hypothesis that is true is rejected once in this many tests.
SURE = 1e9
WAYS = [(memory_dtype, rounding) for memory_dtype in MEMORY_DTYPES for rounding in ROUNDINGS]
ways = pytest.mark.parametrize(("memory_dtype", "rounding"), WAYS)


def token_node(widths: tuple[int, ...], chunk_size: int, **changes: Any) -> dict[str, Any]:
    node = {"mode": "update", "schedule": "any", "widths": list(widths), "activation": "silu", "chunk_size": chunk_size}
    return node | {"residual": 0, "layer_norm": 0} | changes


def stored_node(node: dict[str, Any], memory_dtype: str, rounding: str, seed: int = 0) -> dict[str, Any]:
    more: dict[str, Any] = {"memory_dtype": memory_dtype, "rounding": rounding}
    return node | more | ({"seed": seed} if rounding == "stochastic" else {})


def row_fields(node: dict[str, Any]) -> list[tuple[str, tuple[int, ...], bool]]:
    """Names of a row's fields in order, their shapes, and whether they are stored otherwise. Tensors by number."""
    shapes = weight_shapes(node)
    letters = ["W"]
    if option(node, "batch_size") != node["chunk_size"]:
        letters.append("G")
    if option(node, "momentum_order"):
        letters.append("S")
    if node["rounding"] == "error_feedback":
        letters += [f"E{letter}" for letter in letters if letter != "G"]
    fields = [(f"{letter}{i}", shape, True) for letter in letters for i, shape in enumerate(shapes)]
    chunk = node["chunk_size"]
    rest: list[tuple[str, tuple[int, ...]]] = []
    if operator_of(node) is CHUNK_NEURAL_MEMORY:
        rows = chunk * option(node, "keys_per_token")
        rest += [("k", (rows, node["widths"][0])), ("v", (rows, node["widths"][0])), ("theta", (rows,))]
    else:
        for i, (width_in, width_out) in enumerate(shapes):
            rest += [(f"layer_input{i}", (chunk, width_in)), (f"output_grad{i}", (chunk, width_out))]
        rest += [("e", (chunk,)), ("a", (chunk,)), ("m", (1,)), ("f", (1,)), ("beta", (1,))]
    if node["rounding"] == "stochastic":
        rest.append(("chunk_updates", (1,)))
    return fields + [(name, shape, False) for name, shape in rest]


def pack(node: dict[str, Any], heads: list[Kept]) -> Tensor:
    """Rows (1, H, R) at a chunk's start."""
    rows = []
    for kept in heads:
        parts = []
        for name, shape, stored in row_fields(node):
            if stored:
                found = kept.fields["W" + name[1:] if name[0] == "G" else name]
                parts.append(encode(found, kept.memory_dtype))
            else:
                value = float(name in ("m", "beta")) if name != "chunk_updates" else 0.0
                parts.append(np.full(math.prod(shape), value, np.float32).view(np.uint32))
        row = np.concatenate(parts)
        rows.append(np.pad(row, (0, -len(row) % 16)))
    return torch.from_numpy(np.stack(rows).view(np.float32)).unsqueeze(0)


def unpack(node: dict[str, Any], row: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Words of each field of one row (R,)."""
    words, found, at = row.contiguous().numpy().view(np.uint32), {}, 0
    for name, shape, stored in row_fields(node):
        size = field_words(shape, node["memory_dtype"]) if stored else math.prod(shape)
        found[name] = words[at : at + size]
        at += size
    assert len(words) == -(-at // 16) * 16
    assert not words[at:].any()
    return found


@dataclass(eq=False)
class Dyadic:
    """Streams of a memory that learns nothing, and forgets and carries on by powers of two, so that float32 is exact
    but for one addition for each element and fold.
    """

    node: dict[str, Any]
    chunk_updates: int = 5
    heads: int = 2
    gates: tuple[tuple[float, float], ...] = ((1.0, 1.0), (0.5, 0.5), (0.25, 0.25), (1.0, 0.0), (1.0, 1.0))
    memories: list[Kept] = field(default_factory=list)  # after the last chunk update
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        node = self.node
        draw = np.random.default_rng(0)
        per_chunk = operator_of(node) is CHUNK_NEURAL_MEMORY
        for head in range(self.heads):
            kept = Kept(node["memory_dtype"], node["rounding"], node.get("seed", 0), head)
            values = []
            for _ in range(2):
                tensors = []
                for shape in weight_shapes(node):
                    x = draw.standard_normal(shape) * np.exp(2 * draw.standard_normal(shape))
                    flat = x.reshape(-1, shape[-1])
                    flat[0, :BLOCK_OF_ZEROS] = 0
                    flat[-1] *= 1e-33  # blocks that are stored as zeros
                    flat[len(flat) // 2] *= 100
                    tensors.append(torch.from_numpy(x.clip(-3000, 3000)))  # float16 ends at 65504
                values.append(tensors)
            kept.fresh(*values)
            self.memories.append(kept)
        self.rows = pack(node, self.memories)
        self.before = [self._values(kept) for kept in self.memories]
        for keep, eta in self.gates[: self.chunk_updates]:
            for kept in self.memories:
                w, s = self._values(kept)
                w, s = kept.begin(w, s)
                if per_chunk:
                    s = [eta * x for x in s]
                    w = [_sum(keep * a, b) for a, b in zip(w, s, strict=True)]
                else:
                    w = [_sum(keep * a, (keep + eta) * b) for a, b in zip(w, s, strict=True)]
                    s = [eta * x for x in s]
                kept.end(w, s)

    def _values(self, kept: Kept) -> tuple[list[Tensor], list[Tensor]]:
        shapes = weight_shapes(self.node)
        w, s = ([kept.values(f"{x}{i}").reshape(shape) for i, shape in enumerate(shapes)] for x in "WS")
        return w, s

    def calls(self, cuts: list[int]) -> list[dict[str, Tensor]]:
        """Two tokens a chunk, of which the first changes nothing but takes S in once; with gates of a chunk nothing."""
        draw = torch.Generator().manual_seed(1)
        length, d = 2 * self.chunk_updates, self.node["widths"][0]
        forget, momentum = torch.zeros(length), torch.ones(length)
        for i, (keep, eta) in enumerate(self.gates[: self.chunk_updates]):
            forget[2 * i + 1], momentum[2 * i + 1] = 1 - keep, eta
        calls, at = [], 0
        for cut in cuts:
            part = slice(at, at + cut)
            call = {name: torch.randn(1, self.heads, cut, d, generator=draw) for name in "qkv"}
            call["step_size"] = torch.zeros(1, self.heads, cut)
            call["momentum"] = momentum[part].expand(1, self.heads, -1)
            call["forget_gate"] = forget[part].expand(1, self.heads, -1)
            period = option(self.node, "batch_size") or 2
            call["fill"] = torch.tensor([at % period])
            calls.append(call)
            at += cut
        return calls

    def expect(self, state: Tensor) -> None:
        """Every element and scale of the weights' fields, but for the sign of a zero."""
        for h, kept in enumerate(self.memories):
            found = unpack(self.node, state[0, h])
            for name, shape, stored in row_fields(self.node):
                if stored and name[0] != "G":
                    expected = encode(kept.fields[name], kept.memory_dtype)
                    values = decode(found[name], shape, kept.memory_dtype)
                    assert np.array_equal(values, decode(expected, shape, kept.memory_dtype)), (h, name)
                    if kept.memory_dtype in LARGEST:
                        scales = slice(math.ceil(math.prod(shape) / 4), None)
                        assert np.array_equal(found[name][scales], expected[scales]), (h, name)
            if self.node["rounding"] == "stochastic":
                assert found["chunk_updates"][0] == self.chunk_updates == kept.chunk_updates


BLOCK_OF_ZEROS = 32


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return flushed(flushed(a.float()) + flushed(b.float())).double()


SHAPES = {
    "linear-33": (token_node((33, 33), 2), ["nearest"]),
    "mlp-40-70": (token_node((40, 70, 40), 2), list(ROUNDINGS)),
    "mlp3": (token_node((5, 64, 96, 5), 2), ["stochastic"]),
    "chunk": (make_node((40, 70, 40), 2, batch_size=4, layer_norm=1, norm_weight="fast"), list(ROUNDINGS)),
}


@targets
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
def test_every_bit_is_that_of_the_rule(target: Target, name: str, memory_dtype: str, tmp_path: Path) -> None:
    """Whatever the instruction set and however the stream is cut; and answers are those of the stored values."""
    node, roundings = SHAPES[name]
    for rounding in roundings:
        case = Dyadic(stored_node(node, memory_dtype, rounding, seed=12345))
        for cuts in ([1] * 10, [10], [3, 1, 6]):
            result = run_node(target, tmp_path, case.node, case.rows, case.calls(cuts))
            case.expect(result.state)
        if name != "chunk":
            _expect_answers(target, tmp_path, case, result.state)


def any_elements(draw: np.random.Generator, width: int, memory_dtype: str) -> tuple[Elements, Elements]:
    """Of a square matrix, each finite code as likely as the others, and another whose codes are near those or not."""
    shape, most = (width, width), len(magnitudes(memory_dtype)) - 2
    codes = draw.integers(0, most + 1, shape)
    others = np.where(
        draw.random(shape) < 0.5, draw.integers(0, most + 1, shape), codes + draw.integers(-40, 41, shape)
    )
    found, blocks = [], -(-width // BLOCK)
    powers = draw.integers(-90, 90, (width, blocks))
    for own in (codes, others.clip(0, most)):
        scales = None
        if memory_dtype in LARGEST:
            scales = draw.integers(128, 256, (width, blocks)) * 2.0 ** (powers + draw.integers(-3, 4, (width, blocks)))
            scales[draw.random(scales.shape) < 0.1] = 0
        found.append(Elements(own, draw.random(shape) < 0.5, scales))
    return found[0], found[1]


@targets
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
def test_any_bits_are_updated_by_the_rule(target: Target, memory_dtype: str, tmp_path: Path) -> None:
    """W + S of every kind of number, subnormal and largest ones and sums beyond them, at widths of no round number."""
    draw = np.random.default_rng(5)
    for width in (1, 31, 33):
        for rounding in ("nearest", "stochastic"):
            node, heads = stored_node(token_node((width, width), 1), memory_dtype, rounding, seed=9), []
            for head in range(2):
                kept = Kept(memory_dtype, rounding, 9, head, shapes=[torch.Size((width, width))])
                kept.fields["W0"], kept.fields["S0"] = any_elements(draw, width, memory_dtype)
                heads.append(kept)
            rows = pack(node, heads)
            for kept in heads:
                w, s = kept.values("W0"), kept.values("S0")
                kept.end([_sum(w, s)], [s])
            call = {name: torch.zeros(1, 2, 1, width) for name in "qkv"}
            call |= {"step_size": torch.zeros(1, 2, 1), "forget_gate": torch.zeros(1, 2, 1)}
            call |= {"momentum": torch.ones(1, 2, 1), "fill": torch.tensor([0])}
            state = run_node(target, tmp_path, node, rows, [call]).state
            for h, kept in enumerate(heads):
                fields = unpack(node, state[0, h])
                for name in ("W0", "S0"):
                    expected = decode(encode(kept.fields[name], memory_dtype), (width, width), memory_dtype)
                    found = decode(fields[name], (width, width), memory_dtype)
                    assert np.array_equal(found, expected, equal_nan=True), (width, rounding, name)
                    values = packing.unpack(fields[name], (width, width), memory_dtype)
                    assert np.array_equal(values, found.astype(np.float32), equal_nan=True)


def _expect_answers(target: Target, folder: Path, case: Dyadic, state: Tensor) -> None:
    node = case.node
    spec = MemorySpec(tuple(node["widths"]), chunk_size=2)
    for tokens in (1, 3):
        q = torch.randn(1, case.heads, tokens, spec.widths[0], generator=torch.Generator().manual_seed(2))
        y = run_node(target, folder, node | {"mode": "read"}, state, [{"q": q}]).y[0]
        for h, kept in enumerate(case.memories):
            w = [kept.values(f"W{i}") for i in range(spec.depth)]
            assert worst((y[0, h].double(), token_network(spec, w, q[0, h].double(), None))) < TOLERANCE


# ---- streams that learn ----


def token_stream(
    spec: MemorySpec, case: Case, h: int, kept: Kept, weights: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Equations 12 to 15 of one head, token by token, W and S kept by the rule at the end of each chunk."""
    w, s = kept.fresh(weights, [torch.zeros_like(x) for x in weights])
    scale = None if case.norm_scale is None else case.norm_scale[h]
    q, k, v, theta, eta, alpha = (x[0, h] for x in (case.q, case.k, case.v, *case.gates))
    y = []
    for begin in range(0, case.length, spec.chunk_size):
        end, origin = min(begin + spec.chunk_size, case.length), w
        exact = kept.begin(w, s)
        # Answers are of W and S alone; errors join at the chunk update.
        both = [(w, s), exact]
        for t in range(begin, end):
            leaves = [x.clone().requires_grad_() for x in origin]
            loss = (token_network(spec, leaves, k[t : t + 1], scale) - v[t : t + 1]).square().sum()
            gradient = torch.autograd.grad(loss, leaves)
            for i, (old_w, old_s) in enumerate(both):
                new_s = [eta[t] * a - theta[t] * g for a, g in zip(old_s, gradient, strict=True)]
                both[i] = [(1 - alpha[t]) * a + b for a, b in zip(old_w, new_s, strict=True)], new_s
            y.append(token_network(spec, both[0][0], q[t : t + 1], scale)[0])
        if end - begin == spec.chunk_size:
            w, s = kept.end(*both[1])
    return torch.stack(y), w, s


# Steps of the largest values of a block: what one value that float32 and float64 round to neighbours is off by.
STEP = {"bfloat16": 2**-7, "float16": 2**-10, "int8": 1 / 126, "fp8": 1 / 14}


def _expect_close(
    node: dict[str, Any], state: Tensor, y: Tensor, memories: list[tuple[Kept, Tensor]], first: int
) -> None:
    """y of the first chunk to float32's tolerance; later, up to the few elements that lie on an edge, one step."""
    memory_dtype = node["memory_dtype"]
    for h, (kept, expected) in enumerate(memories):
        found = unpack(node, state[0, h])
        assert worst((y[0, h, :first].double(), expected[:first])) < TOLERANCE
        assert worst((y[0, h].double(), expected)) < STEP[memory_dtype]
        for name, shape, stored in row_fields(node):
            if not stored or name[0] not in "WS":
                continue
            values, exact = decode(found[name], shape, memory_dtype), kept.values(name).numpy().reshape(shape)
            assert np.abs(values - exact).max() <= 1.5 * STEP[memory_dtype] * np.abs(exact).max(), name
            # Values that float32 has off by d go another way in a share d / step of the cases, by one step: by d on
            # average, whatever the steps.
            off = np.abs(values - exact).mean() / np.abs(exact).max()
            assert off < kept.chunk_updates * TOLERANCE, name
        if "chunk_updates" in found:
            assert found["chunk_updates"][0] == kept.chunk_updates > 0


@targets
@ways
def test_a_stream_with_gates_of_a_token_is_the_recurrence(
    target: Target, memory_dtype: str, rounding: str, tmp_path: Path
) -> None:
    spec = MemorySpec((40, 70, 40), "gelu", residual=True, layer_norm=True, chunk_size=8)
    node = token_node(spec.widths, 8, activation="gelu", residual=1, layer_norm=1)
    node = stored_node(node, memory_dtype, rounding, seed=7)
    case = Case(spec, length=28, streams=1, heads=2)
    case.step_size *= 0.1
    memories, kepts = [], []
    for h in range(case.heads):
        weights = [x[0, h] for x in case.weights]
        fresh = Kept(memory_dtype, rounding, 7, h)
        fresh.fresh(weights, [torch.zeros_like(x) for x in weights])
        kept = Kept(memory_dtype, rounding, 7, h)
        y, _, _ = token_stream(spec, case, h, kept, weights)
        memories.append((kept, y))
        kepts.append(fresh)
    rows = pack(node, kepts)
    for cuts in ([28], [1] * 28, random_cuts(28, seed=4)):
        calls, at = [], 0
        for cut in cuts:
            part = slice(at, at + cut)
            call = {n: x[..., part, :] for n, x in zip("qkv", (case.q, case.k, case.v), strict=True)}
            names = ("step_size", "momentum", "forget_gate")
            call |= {n: gate[..., part] for n, gate in zip(names, case.gates, strict=True)}
            assert case.norm_scale is not None
            calls.append(call | {"fill": torch.tensor([at % 8]), "norm_scale": case.norm_scale})
            at += cut
        result = run_node(target, tmp_path, node, rows, calls)
        _expect_close(node, result.state, torch.cat(result.y, 2), memories, 8)


@pytest.mark.parametrize("target", [*cpu_targets(), *cuda_targets(few=True)])
@ways
def test_a_stream_with_gates_of_a_chunk_is_its_equations(
    target: Target, memory_dtype: str, rounding: str, tmp_path: Path
) -> None:
    """With the gradient point, gamma, `initial_weights` and the previous layer's weights."""
    plain = make_node((40, 70, 40), 4, batch_size=8, residual=1, layer_norm=1, norm_weight="fast")
    case = ChunkCase(plain, 19, previous=True, streams=1)
    node = stored_node(plain, memory_dtype, rounding, seed=7)
    memories, kepts, befores = [], [], []
    for h in range(case.heads):
        fresh, kept = Kept(memory_dtype, rounding, 7, h), Kept(memory_dtype, rounding, 7, h)
        weights = split(plain, case.weights[0, h])
        fresh.fresh(weights, [torch.zeros_like(x) for x in weights])
        stream = case.stream(0, h, kept=kept)
        memories.append((kept, stream.y))
        kepts.append(fresh)
        befores.append(stream.initial_weights)
    rows = pack(node, kepts)
    for cuts in ([19], [1] * 19, random_cuts(19, seed=4)):
        result = run_node(target, tmp_path, node, rows, case.calls(cuts), ("--initial-weights",))
        _expect_close(node, result.state, torch.cat(result.y, 2), memories, 3)
        done = 0
        for cut, before in zip(cuts, result.initial_weights, strict=True):
            for j in range(done // 4, (done + cut) // 4):
                for h, expected in enumerate(befores):
                    found = before[0, h, j - done // 4].double()
                    assert worst((found, expected[j])) < STEP[memory_dtype]
            done += cut
    # The gradient point is W of the last position that batch_size divides, in W's own bits.
    state = run_node(target, tmp_path, node, rows, case.calls([16])).state
    for h in range(case.heads):
        fields = unpack(node, state[0, h])
        assert all(np.array_equal(fields[f"G{i}"], fields[f"W{i}"]) for i in range(3))


@targets
@pytest.mark.parametrize("memory_dtype", ["bfloat16", "int8"])
def test_noise_knows_no_slots_no_batch_and_no_threads(target: Target, memory_dtype: str, tmp_path: Path) -> None:
    spec = MemorySpec((33, 40, 33), chunk_size=8)
    node = stored_node(token_node(spec.widths, 8), memory_dtype, "stochastic", seed=3)
    case = Case(spec, length=40, streams=3, heads=2)
    layout = memory_layout(spec, memory_dtype, "stochastic")
    fields = {f"W{i}": w.float().numpy() for i, w in enumerate(case.weights)}
    rows = torch.from_numpy(packing.pack_row(fields, layout.fields, layout.size))
    inputs = dict(zip("qkv", (case.q, case.k, case.v), strict=True))
    inputs |= dict(zip(("step_size", "momentum", "forget_gate"), case.gates, strict=True))

    def run(streams: list[int], slots: list[int], pool: Tensor, *options: str) -> Any:
        call = {name: value[streams] for name, value in inputs.items()}
        call |= {"fill": torch.zeros(len(streams), dtype=torch.int64), "slots": torch.tensor(slots)}
        return run_node(target, tmp_path, node, pool, [call], options)

    pool = torch.zeros(5, *rows.shape[1:])
    pool[[4, 0, 2]] = rows
    together = run([0, 1, 2], [4, 0, 2], pool, "--threads", "2")
    for stream, slot in ((0, 4), (1, 0), (2, 2)):
        alone = run([stream], [0], rows[stream : stream + 1])
        assert torch.equal(alone.y[0][0], together.y[0][stream])
        assert alone.state[0].numpy().tobytes() == together.state[slot].numpy().tobytes()
    # Equal inputs of two heads are rounded apart, and so is another seed's.
    for name in ("q", "k", "v", "step_size", "momentum", "forget_gate"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name]).clone()
    twins = run([0], [0], rows[:1, :1].expand(1, 2, -1).contiguous()).state
    assert not torch.equal(twins[0, 0], twins[0, 1])
    node["seed"] = 4
    assert not torch.equal(run([0], [0], rows[:1, :1].expand(1, 2, -1).contiguous()).state, twins)


@targets
@pytest.mark.parametrize("gates", ["token", "chunk"])
@pytest.mark.parametrize(
    ("memory_dtype", "rounding"), [("int8", "stochastic"), ("fp8", "error_feedback"), ("bfloat16", "nearest")]
)
def test_a_rejected_or_frozen_chunk_leaves_every_bit(
    target: Target, gates: str, memory_dtype: str, rounding: str, tmp_path: Path
) -> None:
    plain = token_node((33, 40, 33), 2) if gates == "token" else make_node((33, 40, 33), 2, batch_size=4)
    case = Dyadic(stored_node(plain, memory_dtype, rounding), chunk_updates=2)
    calls = case.calls([2, 2])
    for call in calls:
        call["step_size"] += 0.1
    calls[0]["v"][:] = math.nan
    calls[0]["update_limit"] = torch.tensor([1e9])
    calls[1]["learn"] = torch.tensor([False])
    for cuts in ([2, 2], [1, 1, 1, 1]):
        parts: list[dict[str, Tensor]] = []
        for call, cut in zip((calls[0], calls[0], calls[1], calls[1]) if len(cuts) == 4 else calls, cuts, strict=True):
            at = len(parts) % 2 if len(cuts) == 4 else 0
            per_token = {"q", "k", "v", "step_size", "momentum", "forget_gate"}
            part = {n: x[:, :, at : at + cut] if n in per_token else x for n, x in call.items()}
            period = 4 if gates == "chunk" else 2
            parts.append(part | {"fill": torch.tensor([sum(cuts[: len(parts)]) % period])})
        result = run_node(target, tmp_path, case.node, case.rows, parts)
        stats = torch.stack(result.stats)[:, 0, 0].sum(0)
        assert stats[3] == 1
        assert stats[2] == (1 if gates == "token" else 0)
        for h in range(case.heads):
            after, before = unpack(case.node, result.state[0, h]), unpack(case.node, case.rows[0, h])
            for name, _, stored in row_fields(case.node):
                if stored or name == "chunk_updates":
                    assert np.array_equal(after[name], before[name]), name


@targets
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
def test_what_is_no_number_is_seen(target: Target, memory_dtype: str, tmp_path: Path) -> None:
    """Without a guard a poisoned key poisons the memory, and no element hides it."""
    case = Dyadic(stored_node(token_node((33, 33), 2), memory_dtype, "nearest"), chunk_updates=1)
    [call] = case.calls([2])
    call["step_size"] += 0.1
    call["k"][:] = math.nan
    state = run_node(target, tmp_path, case.node, case.rows, [call]).state
    for h in range(case.heads):
        found = unpack(case.node, state[0, h])
        assert np.isnan(decode(found["W0"], (33, 33), memory_dtype)).all()
        assert np.isnan(packing.unpack(found["W0"], (33, 33), memory_dtype)).all()


# ---- what the roundings are for ----


def _decay(
    target: Target, folder: Path, memory_dtype: str, rounding: str, chunks: int, alpha: float
) -> tuple[Any, ...]:
    """A linear memory of ones that only forgets: values of W after so many chunks, of 4 heads."""
    node = stored_node(token_node((64, 64), 1), memory_dtype, rounding)
    memories = []
    for head in range(4):
        kept = Kept(memory_dtype, rounding, 0, head)
        kept.fresh([torch.ones(64, 64)], [torch.zeros(64, 64)])
        memories.append(kept)
    call = {name: torch.zeros(1, 4, chunks, 64) for name in "qkv"}
    call |= {name: torch.zeros(1, 4, chunks) for name in ("step_size", "momentum")}
    call |= {"forget_gate": torch.full((1, 4, chunks), alpha), "fill": torch.tensor([0])}
    state = run_node(target, folder, node, pack(node, memories), [call]).state
    found = [unpack(node, state[0, h]) for h in range(4)]
    w, error = (
        [torch.from_numpy(decode(f[name], (64, 64), memory_dtype)) for f in found] if name in found[0] else None
        for name in ("W0", "EW0")
    )
    return w, error


@targets
def test_a_slow_decay_is_lost_to_the_nearest_and_kept_by_noise_and_by_errors(target: Target, tmp_path: Path) -> None:
    alpha, chunks = 2.0**-11, 200
    exact = (1 - alpha) ** chunks  # 0.907
    nearest, _ = _decay(target, tmp_path, "bfloat16", "nearest", chunks, alpha)
    assert all((w == 1).all() for w in nearest), "below 2^-9 the nearest bfloat16 is the old value"
    noisy, _ = _decay(target, tmp_path, "bfloat16", "stochastic", chunks, alpha)
    # A martingale, W / (1 - alpha)^n, whose steps are less than 2^-8 each: Azuma, for the mean over all elements.
    values = torch.stack(noisy).flatten()
    bound = math.sqrt(2 * math.log(2 * SURE) * chunks / len(values)) * 2**-8 / exact
    assert abs(float(values.mean()) - exact) < bound < 0.01
    kept, errors = _decay(target, tmp_path, "bfloat16", "error_feedback", chunks, alpha)
    for w, error in zip(kept, errors, strict=True):
        # Each chunk update loses what an error of at most 2^-9 loses in bfloat16, 2^-9 of it; and float32's own.
        assert float((w + error - exact).abs().max()) < chunks * (2**-18 + 2**-24)
        assert float((w - exact).abs().max()) < 2**-8
    for rounding, limit in (("stochastic", bound * 2), ("error_feedback", chunks * 2**-15)):
        w, error = _decay(target, tmp_path, "int8", rounding, chunks, alpha)
        total = torch.stack(w) if error is None else torch.stack(w) + torch.stack(error)
        assert abs(float(total.mean()) - exact) < limit, rounding


@targets
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
def test_noise_has_no_bias_and_no_memory(target: Target, memory_dtype: str, tmp_path: Path) -> None:
    """One chunk update of many equal values between two neighbours: how many go up is binomial."""
    share = 0.3
    step = {"bfloat16": 2**-7, "float16": 2**-10, "int8": 1 / 64, "fp8": 2**-3}[memory_dtype]
    low = 1 + 3 * step
    w, s = torch.full((64, 64), low), torch.full((64, 64), share * step)
    if memory_dtype in LARGEST:  # the block's largest fixes the scale, and S has the same
        w[:, ::32] = s[:, ::32] = 127 / 64 if memory_dtype == "int8" else 448 / 256
    heads, node = 16, stored_node(token_node((64, 64), 1), memory_dtype, "stochastic", seed=99)
    memories = []
    for head in range(heads):
        kept = Kept(memory_dtype, "nearest", 99, head)
        kept.fresh([w], [s])
        memories.append(kept)
    stored_w, stored_s = memories[0].values("W0").float(), memories[0].values("S0").float()
    call = {name: torch.zeros(1, heads, 1, 64) for name in "qkv"}
    call |= {"step_size": torch.zeros(1, heads, 1), "forget_gate": torch.zeros(1, heads, 1)}
    call |= {"momentum": torch.ones(1, heads, 1), "fill": torch.tensor([0])}
    state = run_node(target, tmp_path, node, pack(node, memories), [call]).state
    x = (stored_w + stored_s).numpy()
    up = []
    for h in range(heads):
        found = decode(unpack(node, state[0, h])["W0"], (64, 64), memory_dtype)
        quiet = round_field(x, memory_dtype, np.ones(x.size)).values(memory_dtype)  # u above every share: always down
        up.append((found != quiet).ravel())
    table = round_field(x, memory_dtype, np.ones(x.size)).values(memory_dtype)
    above = round_field(x, memory_dtype, np.full(x.size, -1.0)).values(memory_dtype)  # always up
    shares = ((x - table) / np.where(above > table, above - table, 1)).ravel()
    used = (shares > 0.01) & (shares < 0.99)
    assert used.mean() > 0.9
    draws = np.stack(up)[:, used] - shares[used]
    # Hoeffding: of independent draws in an interval of 1, for the mean, and for the mean product of two of them.
    assert abs(draws.mean()) < math.sqrt(math.log(2 * SURE) / (2 * draws.size))
    for other in (np.roll(draws, 1, 1), np.roll(draws, 1, 0), np.roll(draws, 64, 1)):
        assert abs((draws * other).mean()) < math.sqrt(2 * math.log(2 * SURE) / draws.size)


def test_noise_is_uniform_over_fields_and_chunk_updates() -> None:
    """The hash itself: mean, variance and products of what differs by one in any of its words."""
    count = 2**16
    base = uniforms(0, 0, 0, False, 0, count)
    assert abs(base.mean() - 0.5) < math.sqrt(math.log(2 * SURE) / (2 * count))
    assert abs(((base - 0.5) ** 2).mean() - 1 / 12) < math.sqrt(math.log(2 * SURE) / (2 * count)) / 4
    others = [(1, 0, 0, False, 0), (0, 1, 0, False, 0), (0, 0, 1, False, 0), (0, 0, 0, True, 0), (0, 0, 0, False, 1)]
    for words in others:
        product = (base - 0.5) * (uniforms(*words, count) - 0.5)
        assert abs(product.mean()) < math.sqrt(math.log(2 * SURE) / (2 * count)) / 2, words


# ---- packing in Python ----


@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
@pytest.mark.parametrize("shape", [(33, 33), (40, 70), (1, 1), (5, 31), (7,), (64, 256)])
def test_packing_is_the_rule(memory_dtype: str, shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(1)
    x = (draw.standard_normal(shape) * np.exp(3 * draw.standard_normal(shape))).astype(np.float32)
    flat = x.reshape(-1, shape[-1])
    flat[0, : min(3, shape[-1])] = [0.0, -0.0, 1e-42][: shape[-1]]
    if len(flat) > 4:
        flat[1] = 0
        flat[2] *= 1e-36
        flat[3, 0] = math.inf
        # A scale that is rounded up may take the largest float32 beyond itself.
        flat[4] = np.finfo(np.float32).max * np.float32(0.5 if memory_dtype in LARGEST else 1) * np.sign(flat[4])
    with np.errstate(over="ignore"):
        words = packing.pack(flat, memory_dtype)
    assert words.dtype == np.uint32
    assert len(words) == packing.field_words(shape, memory_dtype) == field_words(shape, memory_dtype)
    if memory_dtype in LARGEST:
        assert np.array_equal(words, encode(round_field(flat, memory_dtype), memory_dtype))
    found = packing.unpack(words, shape, memory_dtype)
    assert np.array_equal(found, decode(words, shape, memory_dtype), equal_nan=True)
    if memory_dtype not in LARGEST:
        assert np.array_equal(found.reshape(flat.shape), round_field(flat, memory_dtype).values(memory_dtype))


@ways
def test_layouts_are_those_of_the_kernel(memory_dtype: str, rounding: str, tmp_path: Path) -> None:
    """Names in the order of docs/operator.md, and every offset where the oracle's rows have the field."""
    token = stored_node(token_node((5, 40, 5), 3), memory_dtype, rounding)
    chunk = stored_node(
        make_node((5, 40, 5), 2, batch_size=4, activation="gelu", residual=1, layer_norm=1, norm_weight="fast"),
        memory_dtype,
        rounding,
    )
    spec = ChunkMemorySpec(NetworkSpec("mlp", 5, 2, 40), 2, 4, 0.2)
    layouts = [
        (token, memory_layout(MemorySpec((5, 40, 5), chunk_size=3), memory_dtype, rounding)),
        (chunk, chunk_layout(spec).stored(memory_dtype, rounding)),
    ]
    for node, layout in layouts:
        names, offset = [], 0
        for (_, shape, stored), found in zip(row_fields(node), layout.fields, strict=True):
            assert found.offset == offset
            assert found.dtype == (memory_dtype if stored else "float32")
            offset += field_words(shape, memory_dtype) if stored else math.prod(shape)
            names.append(found.name)
        assert layout.size == -(-offset // 16) * 16
        expected = [name for name, _, _ in row_fields(node)]
        gammas = {"W2": "gamma", "G2": "G_gamma", "S2": "S_gamma", "EW2": "EW_gamma", "ES2": "ES_gamma"}
        assert names == [gammas.get(name, name) for name in expected]
        plain = [RowField.from_layout(f) for f in layout.fields if f.kind not in ("rounding_error", "update_count")]
        assert packing.stored_layout(Layout.of(plain).fields, memory_dtype, rounding) == (layout.fields, layout.size)


def test_a_row_packs_and_unpacks_with_its_errors() -> None:
    spec = MemorySpec((40, 70, 40), chunk_size=3)
    layout = memory_layout(spec, "int8", "error_feedback")
    draw = np.random.default_rng(0)
    fields = {f.name: draw.standard_normal((2, 3, *f.shape)).astype(np.float32) for f in layout.fields}
    fields = {name: value for name, value in fields.items() if name[0] != "E"}
    found = packing.unpack_row(packing.pack_row(fields, layout.fields, layout.size), layout.fields)
    for name, value in fields.items():
        if name[0] not in "WS":
            assert np.array_equal(found[name], value)
            continue
        assert np.abs(found[name] - value).max() < np.abs(value).max() / 250
        assert np.abs(found[name] + found[f"E{name}"] - value).max() < np.abs(value).max() / 250**2


@pytest.mark.parametrize(("memory_dtype", "rounding"), [("int4", "nearest"), ("int8", "up"), ("float32", "stochastic")])
def test_unknown_memory_dtypes_are_refused(memory_dtype: str, rounding: str) -> None:
    with pytest.raises(
        TitansError, match=r"\[memory_dtype\] (invalid attribute|contradicting).*\. Fix: choose .*\(TITANS-E070[12]\)"
    ):
        memory_layout(MemorySpec((4, 4)), memory_dtype, rounding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"memory_dtype": "int4"},
            'attribute memory_dtype: expected "float32" or "bfloat16" or "float16" or "int8" or "fp8", got "int4"',
        ),
        (
            {"memory_dtype": "int8", "rounding": "up"},
            'invalid attribute rounding: expected "nearest" or "stochastic" or "error_feedback", got "up"',
        ),
        (
            {"rounding": "error_feedback"},
            'contradicting attributes: memory_dtype "float32" needs rounding "nearest", got "error_feedback"',
        ),
        ({"memory_dtype": "int8", "seed": 3}, 'seed needs rounding "stochastic", got "nearest"'),
        (
            {"memory_dtype": "int8", "rounding": "stochastic", "seed": 2**32},
            "invalid attribute seed: expected [0, 4294967295], got 4294967296",
        ),
    ],
)
def test_nodes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    [plain] = [p for p in targets.args[1] if p.id == "plain"]
    if plain.marks:
        pytest.skip("neural_memory_run is not built: make kernels")
    with pytest.raises(RuntimeError) as failure:
        run_node(plain.values[0], tmp_path, token_node((4, 4), 2) | changes, torch.zeros(1, 1, 64), [])
    assert message in str(failure.value)
