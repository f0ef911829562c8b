"""What the CUDA kernel has beyond the CPU's: half precision, placement, order of threads, values it refuses, resources.

The table of test_kernel.py runs on it too.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import KINDS, Case, random_cuts, worst
from kernel_runner import CUDA, CUDA_BUILDS, CUDA_EMULATED, EMULATED_GPUS, Target, cuda_targets, run_kernel, run_node
from memory_dtype_oracle import MEMORY_DTYPES, ROUNDINGS, Kept, encode
from oracles import titans_stream
from test_kernel import GATES, SHAPES, _calls
from tolerances import TOLERANCES
from torch import Tensor

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes, initial_rows, memory_layout
from titans_export.model.packed_row import Layout
from titans_export.operators import NEURAL_MEMORY

long = pytest.mark.long
targets = pytest.mark.parametrize("target", cuda_targets())
emulated = pytest.mark.skipif(not CUDA_EMULATED.exists(), reason=f"no {CUDA_EMULATED}: make kernels")


def emulated_gpu(gpu: str, order: str = "forward") -> Target:
    environment = (("TITANS_EMULATED_GPU", gpu), ("TITANS_EMULATED_ORDER", order))
    return Target("emulated", (str(CUDA_EMULATED),), environment=environment, cuda=True)


@targets
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["linear", "linear-64", "mlp2-norm", "mlp3-silu", "chunk-33", "mlp-64-256-64", "mlp-31-67-31-gelu-residual-norm"],
)
def test_half_precision_is_as_near_as_its_roundings(
    target: Target, name: str, values: torch.dtype, tmp_path: Path
) -> None:
    spec, length = SHAPES[name]
    case = Case(spec, length, streams=1, heads=2)
    if spec.layer_norm:
        case.step_size *= 0.1
    case.q, case.k, case.v = (x.to(values).double() for x in (case.q, case.k, case.v))
    kind = "cuda-kernel-norm" if spec.layer_norm else "cuda-kernel"
    tolerance = TOLERANCES[kind, str(values).removeprefix("torch.")]
    rows = initial_rows(spec, case.weights)
    for cuts in ([length], random_cuts(length, seed=1)):
        result = run_kernel(target, tmp_path, spec, rows, _calls(case, cuts), values=values)
        y = torch.cat(result.y, 2).double()
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[0, h] for x in (case.q, case.k, case.v, *case.gates)]
            expected, *_ = titans_stream(spec, [x[0, h] for x in case.weights], *inputs, norm_scale=scale)
            assert worst((y[0, h], expected)) < tolerance
            # Where nothing rounds to 8 or 11 bits this would be a thousand times less: the type has its effect.
            assert worst((y[0, h], expected)) > 20 * TOLERANCES["cuda-kernel", "float32"]


@targets
def test_half_precision_answers_reads(target: Target, tmp_path: Path) -> None:
    spec, _ = SHAPES["mlp-64-256-64"]
    case = Case(spec, 70, streams=1, heads=1)
    rows = initial_rows(spec, case.weights)
    for values in (torch.float16, torch.bfloat16):
        q = case.q.to(values).double()
        result = run_kernel(target, tmp_path, spec, rows, [{"q": q}], mode="read", values=values)
        w0, w1 = (x[0, 0] for x in case.weights)
        expected = torch.nn.functional.silu(q[0, 0] @ w0) @ w1
        tolerance = TOLERANCES["cuda-kernel", str(values).removeprefix("torch.")]
        assert worst((result.y[0][0, 0].double(), expected)) < tolerance


@emulated
@pytest.mark.parametrize("name", ["mlp-31-67-31-gelu-residual-norm", "mlp-48-100-33-48-norm", "linear-17", "linear-64"])
@pytest.mark.parametrize("gpu", ["90:132:232448", "87:8:166912", "120:84:16384"])
def test_who_runs_first_changes_no_bit(gpu: str, name: str, tmp_path: Path) -> None:
    """What one thread does before another between two barriers must not matter: it would be a race on a GPU."""
    spec, _ = SHAPES[name]
    cuts = [1, *random_cuts(2 * spec.chunk_size, seed=5), 3 * spec.chunk_size, 3]
    case = Case(spec, sum(cuts), streams=1, heads=1)
    rows = initial_rows(spec, case.weights)
    calls = _calls(case, cuts)
    for index, call in enumerate(calls):
        call["learn"] = torch.tensor([index % 4 != 2 and cuts[index] < 3 * spec.chunk_size])
        if index % 3 != 0:
            call["update_limit"] = torch.tensor([1e3])
    orders = ("forward", "reverse", "1", "2", "3", "4", "5")
    results = [run_kernel(emulated_gpu(gpu, order), tmp_path, spec, rows, calls) for order in orders]
    for other in results[1:]:
        assert torch.equal(results[0].state, other.state)
        for a, b in zip(results[0].y + results[0].stats, other.y + other.stats, strict=True):
            assert torch.equal(a, b)


STORED = [(memory_dtype, rounding) for memory_dtype in MEMORY_DTYPES for rounding in ROUNDINGS]


def _stored_rows(spec: MemorySpec, heads: int, memory_dtype: str, rounding: str) -> tuple[Tensor, list[Kept]]:
    """Rows of random W and S with an empty chunk, (1, heads, R), and the same by the oracle."""
    layout, draw = memory_layout(spec, memory_dtype, rounding), torch.Generator().manual_seed(3)
    rows, kept = torch.zeros(1, heads, layout.size), []
    for head in range(heads):
        w, s = ([torch.randn(shape, generator=draw).double() for shape in spec.shapes] for _ in range(2))
        w[0][0, 0] = 1e-35  # what most memory_dtypes cannot tell from 0
        w[0][1] = 0.0
        each = Kept(memory_dtype, rounding, seed=5, head=head)
        each.fresh(w, s)
        each.chunk_updates = 7
        kept.append(each)
        words = rows[0, head].view(torch.int32)
        _put(words, layout, each)
        for name in ("m", "beta"):
            rows[0, head, _offset(layout, name)] = 1.0
    return rows, kept


def _offset(layout: Layout, name: str) -> int:
    return next(field.offset for field in layout.fields if field.name == name)


def _put(words: Tensor, layout: Layout, kept: Kept) -> None:
    for name, elements in kept.fields.items():
        packed = torch.from_numpy(encode(elements, kept.memory_dtype).view("int32").copy())
        at = _offset(layout, name)
        words[at : at + len(packed)] = packed
    if kept.rounding == "stochastic":
        words[_offset(layout, "chunk_updates")] = kept.chunk_updates


@targets
@pytest.mark.parametrize("widths", [(33, 33), (6, 70, 6)], ids=["linear-33", "mlp-6-70-6"])
@pytest.mark.parametrize(("memory_dtype", "rounding"), STORED)
def test_what_a_fold_stores_is_to_the_bit_what_the_contract_says(
    target: Target, memory_dtype: str, rounding: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    """With a step size of 0 and gates of a half all that is rounded is exact, so every bit is known beforehand."""
    spec, tokens, heads = MemorySpec(widths, chunk_size=2), 8, 2
    rows, kept = _stored_rows(spec, heads, memory_dtype, rounding)
    case = Case(spec, tokens, streams=1, heads=heads)
    case.step_size.zero_()
    case.momentum.fill_(0.5)
    case.forget_gate.fill_(0.5)
    seed = 5 if rounding == "stochastic" else 0
    stored = {"memory_dtype": memory_dtype, "rounding": rounding, "seed": seed}
    node = NEURAL_MEMORY.given({**attributes(spec, "update", False), **stored})
    expected, layout = rows.clone(), memory_layout(spec, memory_dtype, rounding)
    for head, each in enumerate(kept):
        for _ in range(tokens // spec.chunk_size):
            w, s = ([each.values(f"{letter}{i}") for i in range(spec.depth)] for letter in "WS")
            w, s = each.begin(w, s)
            # beta = m = 1/4; f = 1/2 1/2 + 1/4.
            each.end([w[i] / 4 + s[i] / 2 for i in range(spec.depth)], [x / 4 for x in s])
        _put(expected[0, head].view(torch.int32), layout, each)
    for cuts in ([tokens], [1] * tokens, [3, 1, 4]):
        state = run_node(target, tmp_path, node, rows, _calls(case, cuts)).state
        for field in layout.fields:
            if field.name[0] in "WSE" or field.name == "chunk_updates":
                part = slice(field.offset, field.offset + field.words)
                a, b = (x[..., part].contiguous().view(torch.int32) for x in (state, expected))
                assert torch.equal(a, b), f"{field.name}, {cuts}"
    # Neither a chunk that is rejected nor one that learns nothing touches a bit.
    for refused in ({"update_limit": torch.tensor([0.0])}, {"learn": torch.tensor([False])}):
        [call] = _calls(case, [tokens])
        state = run_node(target, tmp_path, node, rows, [{**call, **refused}]).state
        end = _offset(layout, "layer_input0")
        assert torch.equal(state[..., :end].view(torch.int32), rows[..., :end].view(torch.int32))
        if rounding == "stochastic":
            at = _offset(layout, "chunk_updates")
            assert torch.equal(state[..., at].view(torch.int32), rows[..., at].view(torch.int32))


@emulated
@pytest.mark.parametrize(("memory_dtype", "rounding"), [("int8", "error_feedback"), ("bfloat16", "stochastic")])
@pytest.mark.parametrize("gpu", ["90:132:232448", "87:8:166912", "120:84:16384"])
def test_who_runs_first_changes_no_bit_of_what_is_stored(
    gpu: str, memory_dtype: str, rounding: str, tmp_path: Path
) -> None:
    spec = MemorySpec((6, 70, 6), chunk_size=2)
    rows, _ = _stored_rows(spec, 1, memory_dtype, rounding)
    cuts = [5, 1, 1, 3]
    calls = _calls(Case(spec, sum(cuts), streams=1, heads=1), cuts)
    calls[0]["update_limit"] = torch.tensor([1e3])
    stored = {"memory_dtype": memory_dtype, "rounding": rounding}
    node = NEURAL_MEMORY.given({**attributes(spec, "update", False), **stored})
    results = [run_node(emulated_gpu(gpu, order), tmp_path, node, rows, calls) for order in ("forward", "1", "2", "3")]
    for other in results[1:]:
        assert torch.equal(results[0].state.view(torch.int32), other.state.view(torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(results[0].y, other.y, strict=True))


def _placement(gpu: str, name: str, streams: int, length: int, folder: Path, values: torch.dtype) -> str:
    spec, _ = SHAPES[name]
    case = Case(spec, length, streams=streams, heads=1)
    rows = initial_rows(spec, case.weights)
    result = run_kernel(emulated_gpu(gpu), folder, spec, rows, _calls(case, [length]), values=values)
    placement: str = json.loads(result.report)["placement"]
    return placement


@emulated
def test_a_head_is_spread_as_far_as_it_must_and_as_the_gpu_has_room(tmp_path: Path) -> None:
    hopper, ampere, full = "90:132:232448", "80:108:166912", "90:2:232448"
    values = torch.bfloat16
    one = _placement(hopper, "mlp-64-256-64", 1, 3, tmp_path, values)
    assert one.startswith("blocks 8 in a cluster") and "state shared" in one and "exchange shared" in one
    many = _placement(full, "mlp-64-256-64", 2, 3, tmp_path, values)
    assert re.match(r"blocks [24] in a cluster", many) and "state shared" in many, "as few as hold W and S"
    old = _placement(ampere, "mlp-64-256-64", 1, 3, tmp_path, values)
    assert old.startswith("blocks 8,") and "exchange workspace" in old, "no cluster before sm_90"
    assert _placement(full, "linear-64", 2, 3, tmp_path, values).startswith("blocks 1,")
    assert "state workspace" in _placement("120:84:8192", "mlp-64-256-64", 1, 3, tmp_path, values)
    small = _placement("110:20:232448:2", "mlp-64-256-64", 1, 3, tmp_path, values)
    assert small.startswith("blocks 2 in a cluster"), "no more than fit into a cluster there"
    # A single token leaves room for other blocks on its multiprocessor.
    token = _placement(full, "mlp-64-256-64", 2, 1, tmp_path, values)
    shared = re.search(r"shared (\d+) bytes", token)
    assert shared and int(shared.group(1)) <= (232448 + 1024) // 2 - 1024


@targets
@pytest.mark.parametrize("operand", ["fill", "valid", "slots", *GATES])
@pytest.mark.parametrize("size", [1, 5])
def test_a_stream_with_bad_values_is_left_alone_and_others_go_on(
    target: Target, operand: str, size: int, tmp_path: Path
) -> None:
    spec = KINDS["mlp2-silu"]
    case = Case(spec, length=size, streams=3)
    pool = torch.randn(4, case.heads, memory_layout(spec).size, dtype=torch.float64)
    slots = torch.tensor([3, 1, 2])
    pool[slots] = initial_rows(spec, case.weights)
    [call] = _calls(case, [size])
    call |= {"slots": slots, "valid": torch.full((3,), size)}
    good = run_kernel(target, tmp_path, spec, pool, [call])
    bad = {name: value.clone() for name, value in call.items()}
    wrong = {"fill": spec.chunk_size, "valid": size + 1, "slots": 4}
    if operand in wrong:
        bad[operand][1] = wrong[operand]
    else:
        bad[operand][1, 2, size - 1] = math.inf
    words = "gate not finite" if operand in GATES else "value out of range"
    with pytest.raises(RuntimeError, match=rf"\[NeuralMemory\] {words}: {operand} of a stream.*\. Fix: "):
        run_kernel(target, tmp_path, spec, pool, [bad])
    result = run_kernel(target, tmp_path, spec, pool, [bad], options=("--keep-going",))
    assert operand in json.loads(result.report)["status"]
    assert torch.equal(result.state[[0, 1]], pool.float()[[0, 1]]), "the bad stream's row and that of no stream"
    assert torch.isnan(result.y[0][1]).all() and torch.isnan(result.stats[0][1]).all()
    for b in (0, 2):
        assert torch.equal(result.y[0][b], good.y[0][b])
        assert torch.equal(result.state[slots[b]], good.state[slots[b]])


@targets
def test_two_streams_in_one_slot_are_refused(target: Target, tmp_path: Path) -> None:
    spec = KINDS["linear"]
    case = Case(spec, length=4, streams=3)
    [call] = _calls(case, [4])
    call["slots"] = torch.tensor([0, 2, 2])
    rows = initial_rows(spec, case.weights)
    with pytest.raises(RuntimeError, match="value out of range: slots of a stream"):
        run_kernel(target, tmp_path, spec, rows, [call])


@targets
def test_shapes_are_checked_before_anything_runs(target: Target, tmp_path: Path) -> None:
    spec = KINDS["linear"]
    case = Case(spec, length=4)
    [call] = _calls(case, [4])
    rows = initial_rows(spec, case.weights)
    with pytest.raises(RuntimeError, match=r"\[NeuralMemory\] wrong shape of step_size: expected"):
        run_kernel(target, tmp_path, spec, rows, [{**call, "step_size": call["step_size"][..., :2]}])
    with pytest.raises(RuntimeError, match=r"incomplete chunk: .* needs a multiple of 8 tokens, got 4"):
        run_kernel(target, tmp_path, spec, rows, [{n: x for n, x in call.items() if n != "fill"}], aligned=True)


@emulated
def test_gpus_that_are_too_old_or_rows_too_large_are_refused(tmp_path: Path) -> None:
    def attempt(gpu: str, width: int) -> str:
        spec = replace(KINDS["linear"], widths=(width, width))
        case = Case(KINDS["linear"], length=1, streams=1, heads=1)
        call: dict[str, Tensor] = _calls(case, [1])[0]
        with pytest.raises(RuntimeError) as caught:
            run_kernel(emulated_gpu(gpu), tmp_path, spec, torch.zeros(1, 1, 16), [call])
        return str(caught.value)

    old = attempt("75:40:65536", 6)
    assert re.match(r"\[NeuralMemory\] not supported on this GPU: .* capability 8.0 .*, got 7.5\. Fix: run", old)
    assert "elements of a packed row, got " in attempt("90:132:232448", 12_000)


@pytest.mark.skipif(not CUDA.exists(), reason=f"no {CUDA}: make kernels, with nvcc installed")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    done = subprocess.run([str(CUDA), "--device"], capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert re.match(r"\[NeuralMemory\] CUDA call failed: cudaError\w+: .*\. Fix: check device", done.stderr)


# The most registers a thread may have for the blocks that shall share a multiprocessor: 65536 / (256 threads x blocks).
KERNELS = {"update_blocks": 255, "update_token": 128, "update_token_in_place": 255, "read_rows": 255}
KERNELS |= {"attend": 128, "write_rings": 128, "convolve": 128, "connect": 128, "update_chunks": 255}


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=long), "cuda-two", pytest.param("cuda-rest", marks=long)])
def test_no_kernel_spills_on_any_gpu(name: str) -> None:
    build = CUDA_BUILDS[name]
    reports = sorted((build / "ptxas").glob("*.txt"))
    if not reports:
        pytest.skip(f"no {build.relative_to(build.parents[1])}: tools/build {name}, with nvcc installed")
    report = "".join(path.read_text() for path in reports)
    entries = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    found: dict[str, set[tuple[str, str]]] = {}
    for symbol, architecture, stack, stores, loads, registers in entries:
        named = re.search(rf"\d({'|'.join(KERNELS)})(?:I(\w+?)EEv)?", symbol)
        assert named, symbol
        kernel, values = named.group(1), named.group(2) or ""
        if kernel == "update_token" and values.endswith("Lb0E"):
            kernel = "update_token_in_place"
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{kernel}<{values}> spills on {architecture}"
        assert int(registers) <= KERNELS[kernel], f"{kernel}<{values}> on {architecture}"
        found.setdefault(architecture, set()).add((kernel, values))
    cache = (build / "CMakeCache.txt").read_text()
    listed, left_out = (
        re.search(rf"^TITANS_CUDA_{what}:\w+=(\S*)$", cache, re.MULTILINE) for what in ("ARCHITECTURES", "EXCEPT")
    )
    assert listed and left_out
    assert found.keys() == {f"sm_{each}" for each in {*listed[1].split(";")} - {*left_out[1].split(";")}}
    # Of memories: three types of values; updates for what fits into shared memory, and for what does not. Of attention:
    # few rows, many rows, and the rings. One kernel for each of the other operators.
    assert all(len(kernels) == 3 * 5 + 3 + 1 + 1 + 1 for kernels in found.values())


def test_emulated_gpus_differ_in_what_decides() -> None:
    cluster = {gpu.split(":")[0] >= "90" for gpu, _ in EMULATED_GPUS.values()}
    assert cluster == {True, False}
