"""A model of titans-pytorch, exported and run by the runtime, streams what the library's parallel forward computes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: make setup")
titans_runtime = pytest.importorskip(
    "titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError
)

from library_models import (  # noqa: E402
    FUSED_NETWORKS,
    MEMORY_SETS,
    double,
    make_transformer,
    memory_of,
    pairs_of,
    parallel_forward,
    possible,
    possible_pairs,
    scale,
    set_forgetting,
)
from tolerances import TOLERANCES  # noqa: E402

from titans_export.checkpoints.titans_pytorch import from_live  # noqa: E402
from titans_export.exporting import export_loaded  # noqa: E402
from titans_export.model.stream import Call, StateInfo  # noqa: E402
from titans_export.schedule import next_graph  # noqa: E402

pytestmark = pytest.mark.timeout(900)

TOLERANCE = TOLERANCES["cpu", "float32"]
# No multiples of a batch: there the library's last output with gated_transition is of the weights before it.
LENGTH = 601
EXPORTED = 17
SAVED = 233  # within a chunk and within a batch
# The library's own float32 stays this close to float64, else the model says nothing about ours.
FAIR = TOLERANCE / 2
# What learning changes must be far more than the tolerance.
MATTERS = 100 * TOLERANCE
MEMORY: dict[str, Any] = {
    "dim_head": 8,
    "heads": 2,
    "attn_pool_chunks": True,
    "qk_rmsnorm": True,
    "per_parameter_lr_modulation": True,
    "default_step_transform_max_lr": 0.1,
}


@dataclass(frozen=True)
class Case:
    """A model of the library and how it is exported. fused: whether the operator has its memory."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    fused: bool
    memories: int
    chunks_per_call: int
    several: bool  # tokens in a chunk


class Exported(NamedTuple):
    bundle: Path
    inputs: NDArray[Any]
    right: NDArray[np.float64]
    float32_error: float


def random_tokens(size: int) -> Tensor:
    return torch.randint(0, size, (LENGTH,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)


def memory_case(index: int) -> Case:
    options, seed, temper = MEMORY_SETS[index]
    views = (3,) if options["qkv_receives_diff_views"] else ()
    width = 12 if options["heads"] == 1 else 16
    momentum, gated = options["momentum"], options["gated_transition"] and options["batch"] != "never"
    return Case(
        lambda: memory_of(options, seed, temper),
        lambda: torch.randn(LENGTH, *views, width, generator=torch.Generator().manual_seed(seed)),
        options["network"] in FUSED_NETWORKS and momentum in ("none", "order 1") and not gated,
        1,
        2 if index % 8 == 2 else 1,
        options["chunk_size"] > 1,
    )


def transformer_case(
    network: str = "mlp-2",
    chunk: int = 5,
    batch: int | None = None,
    memory: dict[str, Any] | None = None,
    chunks_per_call: int = 1,
    temper: tuple[float, float, float, float] = (0.5, 1, 1, 1),
    seed: int = 0,
    **kwargs: Any,
) -> Case:
    """temper: what the forget gates begin at, what values, first weights and what is read are multiplied with."""
    arguments: dict[str, Any] = {
        "num_tokens": 40,
        "dim": 16,
        "depth": 2,
        "segment_len": 8,
        "num_longterm_mem_tokens": 2,
        "num_persist_mem_tokens": 3,
        "dim_head": 8,
        "heads": 2,
        "num_residual_streams": 4,
        "neural_memory_segment_len": chunk,
        "neural_memory_batch_size": batch,
        "neural_memory_layers": (1, 2),
        "neural_mem_weight_residual": True,
        "neural_memory_qkv_receives_diff_views": True,
        "sliding_window_attn": True,
    } | kwargs
    all_of_memory = MEMORY | (memory or {})

    def make() -> nn.Module:
        module = make_transformer(seed, network, dict(all_of_memory), **arguments)
        set_forgetting(module, temper[0])
        scale(module, *temper[1:])
        return module

    momentum = all_of_memory.get("momentum_order", 1) == 1
    return Case(
        make,
        lambda: random_tokens(arguments["num_tokens"]),
        network in FUSED_NETWORKS and momentum and not all_of_memory.get("gated_transition"),
        len(arguments["neural_memory_layers"]),
        chunks_per_call,
        True,
    )


# train_mac's own settings, all at once; widths and depth are smaller.
TRAIN_MAC: dict[str, Any] = {
    "depth": 4,
    "segment_len": 32,
    "num_persist_mem_tokens": 4,
    "num_longterm_mem_tokens": 4,
    "neural_memory_layers": (2, 4),
    "chunk": 4,
    "batch": 128,
    "memory": {"heads": 4, "spectral_norm_surprises": True},
    "temper": (0.9, 10, 1, 0.2),
    "seed": 4,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "train_mac": TRAIN_MAC,
    "segmented, chunks of a prime, one stream": {
        "sliding_window_attn": False,
        "chunk": 3,
        "batch": 6,
        "num_residual_streams": 1,
        "depth": 3,
        "neural_memory_layers": (1, 3),
        "memory": {"attn_pool_chunks": False, "num_kv_per_token": 2, "default_step_transform_max_lr": 0.01},
        "temper": (0.01, 1, 3, 1),
    },
    "no longterm rows, gates of attention": {
        "num_longterm_mem_tokens": 0,
        "chunk": 4,
        "batch": 8,
        "neural_mem_gate_attn_output": True,
        "num_residual_streams": 2,
        "chunks_per_call": 2,
        "memory": {"post_rmsnorm": True, "max_grad_norm": 0.05},
        "temper": (0.01, 3, 1, 1),
    },
    "no persistent rows, momentum of order 2": {
        "num_persist_mem_tokens": 0,
        "segment_len": 5,
        "num_longterm_mem_tokens": 1,
        "chunk": 4,
        "sliding_window_attn": False,
        "memory": {"momentum_order": 2, "learned_momentum_combine": True, "store_with_lookahead_value": True},
    },
    "chunks longer than a segment, one view, no weight residual": {
        "num_longterm_mem_tokens": 0,
        "chunk": 10,
        "batch": 20,
        "neural_mem_weight_residual": False,
        "neural_memory_qkv_receives_diff_views": False,
        "num_residual_streams": 1,
        "neural_mem_gate_attn_output": True,
        "memory": {"activation": "sigmoid", "mem_model_norm_add_residual": False},
    },
    "gated-residual, transition, views without weight residual": {
        "network": "gated-residual",
        "num_longterm_mem_tokens": 0,
        "num_persist_mem_tokens": 0,
        "chunk": 4,
        "batch": 16,
        "neural_mem_weight_residual": False,
        "num_residual_streams": 2,
        "memory": {"gated_transition": True, "momentum": False},
    },
    "memory in the last layer only, one head": {
        "neural_memory_layers": (2,),
        "num_longterm_mem_tokens": 0,
        "segment_len": 6,
        "sliding_window_attn": False,
        "memory": {"heads": 1, "dim_head": 16, "per_parameter_lr_modulation": False},
    },
}
CASES: dict[str, Case] = {
    **{f"memory {i}: {MEMORY_SETS[i].options['network']}": memory_case(i) for i in range(len(MEMORY_SETS))},
    **{name: transformer_case(**options) for name, options in TRANSFORMERS.items()},
}
MEMORIES = [name for name in CASES if name.startswith("memory ") and name[7].isdigit()]


def every_value() -> set[str]:
    """Few memories that have every value of every option between them: the one with most missing values comes next."""
    values = {name: set(case.options.items()) for name, case in zip(MEMORIES, MEMORY_SETS, strict=True)}
    missing, chosen = set().union(*values.values()), set()
    while missing:
        name = max(MEMORIES, key=lambda each: len(values[each] & missing))
        chosen.add(name)
        missing -= values[name]
    return chosen


# `make test` runs every value of every memory option once, and a transformer with segmented attention.
# test_cli_titans_pytorch.py exports one with sliding attention and a gated output.
QUICK = {*every_value(), "segmented, chunks of a prime, one stream"}


def first(fused: bool) -> str:
    """The first bare memory with chunks of several tokens that a kernel covers, or that none does."""
    suitable = [name for name in MEMORIES if CASES[name].fused == fused and CASES[name].several]
    return next((name for name in suitable if name in QUICK), suitable[0])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a case by its name, once."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def get(name: str) -> Exported:
        if name not in made:
            case = CASES[name]
            module, inputs = case.make(), case.inputs()
            exact, single = parallel_forward(double(module), inputs), parallel_forward(module, inputs)
            bundle = folder / f"{zlib.crc32(name.encode())}.titans"
            export_loaded(from_live(module), bundle, chunks_per_call=case.chunks_per_call, positions=EXPORTED)
            error = float((single - exact).abs().max())
            made[name] = Exported(bundle, inputs.numpy(), exact.numpy(), error)
        return made[name]

    return get


def fed(stream: Any, inputs: NDArray[Any], cuts: list[int]) -> NDArray[np.float32]:
    """Outputs of the inputs, fed in the given cuts."""
    assert sum(cuts) == len(inputs)
    return np.concatenate([stream.feed(part) for part in np.split(inputs, np.cumsum(cuts)[:-1])])


def random_cuts(total: int, seed: int) -> list[int]:
    chance = np.random.default_rng(seed)
    cuts: list[int] = []
    while sum(cuts) < total:
        longest = int(chance.choice([1, 3, 12, 100]))
        cuts.append(min(int(chance.integers(0, longest + 1)), total - sum(cuts)))
    return cuts


def test_every_pair_of_options_occurs() -> None:
    sets = [options for options, _, _ in MEMORY_SETS]
    assert len(sets) >= 30
    assert all(possible(options) for options in sets)
    assert possible_pairs() == set().union(*map(pairs_of, sets))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in CASES])
def test_streams_the_parallel_forward(name: str, exported: Callable[[str], Exported], tmp_path: Path) -> None:
    bundle, inputs, right, float32_error = exported(name)
    assert np.isfinite(right).all()
    assert float32_error < FAIR
    with titans_runtime.Session(bundle) as session:
        for cuts in ([LENGTH], [1] * LENGTH, random_cuts(LENGTH, 3)):
            stream, sizes = session.stream(), set()
            got = fed(stream, inputs[:1], [1])
            sizes.add(stream.state_bytes)
            stream.reset()
            got = fed(stream, inputs, cuts)
            sizes.add(stream.state_bytes)
            assert np.abs(got - right).max() < TOLERANCE, f"{len(cuts)} calls"
            assert len(sizes) == 1
        frozen = session.stream()
        frozen.freeze()
        assert np.abs(fed(frozen, inputs, [LENGTH]) - right).max() > MATTERS
        saved = session.stream()
        saved.feed(inputs[:SAVED], outputs="none")
        saved.save(tmp_path / "one.tstate")
        expected = saved.feed(inputs[SAVED:])
    with titans_runtime.Session(bundle) as another:
        got = another.restore(tmp_path / "one.tstate").feed(inputs[SAVED:])
    assert np.array_equal(got, expected)
    assert np.abs(got - right[SAVED:]).max() < TOLERANCE


def rows_before(facts: StateInfo, position: int) -> int:
    """Rows of the stream before a token."""
    rows = facts.rows or {"segment": 1, "longterm": 0}
    return position + rows["longterm"] * (position // rows["segment"])


def check_promises(facts: StateInfo, old: Tensor, new: Tensor, first: int, end: int) -> None:
    """That a call of rows [first, end) changes no more of a state tensor than the manifest says."""
    if facts.written is not None:
        axis, period = facts.written["axis"], facts.written["period"]
        changed = (new != old).transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist()
        promised = {start + row % period for row in range(first, end) for start in facts.written["first"]}
        assert changed
        assert set(changed) <= promised
    if facts.chunk is not None and first // facts.chunk == end // facts.chunk:
        for field in facts.layout:
            size = int(np.prod(field.shape, dtype=int))
            kept = first % facts.chunk * (size // facts.chunk) if field.name in ("k", "v", "theta") else size
            part = slice(field.offset, field.offset + kept)
            assert torch.equal(new[..., part], old[..., part]), field.name


@pytest.mark.parametrize("name", ["train_mac", "no longterm rows, gates of attention"])
def test_a_call_changes_no_more_of_the_state_than_the_manifest_says(name: str) -> None:
    """What a failed call is undone from."""
    case = CASES[name]
    model, inputs = from_live(case.make()).model, torch.as_tensor(case.inputs()).long()
    facts, state, position = model.state_info(), model.initial_state(1), 0
    kinds = {(bool(entry.written), bool(entry.chunk)) for entry in facts.values()}
    assert kinds == {(True, False), (False, True), (False, False)}
    graphs = model.graphs(case.chunks_per_call)
    calls = [graph for graph in graphs if graph.tokens > 1]
    # Then a token at a time, over more than a ring.
    for graph in [*calls, *[None] * (max(graph.stride for graph in graphs) + 9)]:
        graph = graph or next_graph(graphs, position, 1)
        end, old = position + graph.tokens, state
        with torch.no_grad():
            _, state = model.call(inputs[None, position:end], state, Call(graph, torch.tensor([position])))
        for key, entry in facts.items():
            check_promises(entry, old[key], state[key], rows_before(entry, position), rows_before(entry, end))
        position = end


def memory_nodes(bundle: Path) -> dict[str, int]:
    """By graph."""
    graphs = {path.stem: onnx.load(path, load_external_data=False).graph for path in bundle.glob("*.onnx")}
    return {
        name: sum((node.domain, node.op_type) == ("ai.titans", "ChunkNeuralMemory") for node in graph.node)
        for name, graph in graphs.items()
    }


def check_kernel(name: str, exported: Callable[[str], Exported]) -> None:
    case, (bundle, inputs, right, _) = CASES[name], exported(name)
    nodes = memory_nodes(bundle)
    assert nodes
    assert set(nodes.values()) == {case.memories if case.fused else 0}
    with titans_runtime.Session(bundle) as session:
        if case.fused:
            assert session.info["memory_kernel"].startswith("cpu-")
    with titans_runtime.Session(bundle, memory_kernel="off") as session:
        assert session.info["memory_kernel"] == "standard-operators"
        got = fed(session.stream(), inputs, random_cuts(LENGTH, 4))
        assert np.abs(got - right).max() < TOLERANCE


@pytest.mark.long
def test_train_mac_runs_on_the_kernel(exported: Callable[[str], Exported]) -> None:
    check_kernel("train_mac", exported)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_without_the_kernel(fused: bool, exported: Callable[[str], Exported]) -> None:
    check_kernel(first(fused), exported)


def learned(stream: Any) -> dict[str, NDArray[np.float32]]:
    """What memory() gives, without the open chunk, which takes in tokens also when nothing is learned from them."""
    fields: dict[str, NDArray[np.float32]] = stream.memory()
    return {name: value for name, value in fields.items() if name.rpartition(".")[2] not in ("k", "v", "theta")}


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_a_frozen_memory_stays_and_goes_on(fused: bool, exported: Callable[[str], Exported]) -> None:
    bundle, inputs, _, _ = exported(first(fused))
    with titans_runtime.Session(bundle) as session:
        stream = session.stream()
        stream.feed(inputs[:99])
        before = learned(stream)
        assert any("W" in field for field in before)
        stream.freeze()
        stream.feed(inputs[99:250])
        stream.feed(inputs[250:257])
        for row in inputs[257:300]:
            stream.step(row)
        after = learned(stream)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[field].view(np.int32), after[field].view(np.int32)) for field in before)
        stream.resume()
        assert np.isfinite(stream.feed(inputs[300:400])).all()
        assert any(np.abs(value - before[field]).max() > MATTERS / 10 for field, value in learned(stream).items())
