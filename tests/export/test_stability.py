"""Models that amplify rounding: what comparisons with the library and with PyTorch find, and what they accept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_tools import invoke
from library_models import parallel_forward, randomise
from torch import nn

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: make setup")

from unstable_models import make, reported

from titans_export.bundle import read_bundle
from titans_export.call_check import check_calls
from titans_export.checkpoints import Checkpoint
from titans_export.checkpoints.titans_pytorch import from_live
from titans_export.checkpoints.titans_pytorch.build import _model
from titans_export.checkpoints.titans_pytorch.live import from_module
from titans_export.errors import MismatchError
from titans_export.exporting import export_loaded
from titans_export.golden import sample_inputs
from titans_export.model import StreamModel
from titans_export.model.titans_pytorch import memory as memory_module
from titans_export.output_limits import limits_of
from titans_export.reference import TOLERANCE, exact_outputs_of, library_outputs_of, outputs_of
from titans_export.stability import (
    library_error_of,
    limits_from,
    measured_limits,
    running_error,
    shortest_horizon,
    stable_limits,
)

pytestmark = pytest.mark.timeout(900)
LENGTH = 48  # of the comparisons with the library
KINDS = {"stable": False, "chaotic": True}


def module_of(kind: str, seed: int) -> nn.Module:
    """A transformer without parameters that begin as constants: a fault in these would change nothing."""
    return randomise(make(KINDS[kind], seed, memory={"per_parameter_lr_modulation": True})).eval()


# ---- the library ----

# Other values of arguments that no tensor reveals: of the transformer and of its memory.
OPTIONS: dict[str, Any] = {
    "segment_len": 16,
    "sliding_window_attn": True,
    "memory.chunk_size": 8,
    "memory.batch_size": 16,
    "memory.default_step_transform_max_lr": 1.01,  # a factor
    "memory.max_mem_layer_modulation": 1.01,
    "memory.max_grad_norm": 0.02,
    "memory.spectral_norm_surprises": None,  # the opposite
    "memory.store_with_lookahead_value": True,
    "memory.activation": "silu",
}


def wrong_options(options: Any, name: str) -> Any:
    """The options with one argument changed."""
    owner, _, key = name.rpartition(".")
    own = options.memory if owner else options
    old, new = getattr(own, key), OPTIONS[name]
    value = not old if new is None else old * new if isinstance(new, float) and old else new
    assert value != old
    changed = replace(own, **{key: value})
    return replace(options, memory=changed) if owner else changed


def wrong_tensors(model: StreamModel) -> Iterator[tuple[str, Callable[[], None]]]:
    """Changes of parameters, each with a function that makes it and undoes it when called again."""
    by_shape: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.any():
            yield f"sign of {name}", lambda p=parameter: p.data.neg_()
            by_shape.setdefault(tuple(parameter.shape), []).append((name, parameter))
    for group in by_shape.values():
        for (name, one), (other_name, other) in pairwise(group):
            if not torch.equal(one, other):
                yield f"{name} for {other_name}", lambda a=one, b=other: _swap(a, b)


def _swap(one: nn.Parameter, other: nn.Parameter) -> None:
    one.data, other.data = other.data, one.data


def is_found(checkpoint: Checkpoint, inputs: torch.Tensor) -> bool:
    try:
        library_error_of(checkpoint, inputs, exact_outputs_of(checkpoint.model, inputs))
    except MismatchError as error:
        assert error.code == "TITANS-E0252"
        return True
    return False


def missed(kind: str, seed: int, few: bool) -> tuple[list[str], int]:
    """Faults in a model that the comparison with the library misses, and the number of faults."""
    module = module_of(kind, seed)
    source, right = from_module(module), from_live(module)
    inputs = sample_inputs(right.model, LENGTH)
    known = library_outputs_of(right, inputs)
    assert known is not None
    checkpoint = replace(right, oracle=lambda: lambda _: torch.from_numpy(known)[None])
    assert not is_found(checkpoint, inputs), "falsely refused"
    undetected = []
    tensors = list(wrong_tensors(right.model))
    tensors = tensors[:: max(1, len(tensors) // 6)] if few else tensors
    for name, change in tensors:
        change()
        undetected += [name] * (not is_found(checkpoint, inputs))
        change()
    for name in list(OPTIONS)[seed % 2 :: 2] if few else OPTIONS:
        wrong = _model(replace(source, options=wrong_options(source.options, name)), "wrong", None).eval()
        undetected += [name] * (not is_found(replace(checkpoint, model=wrong), inputs))
    return undetected, len(tensors) + len(OPTIONS)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_finds_faults(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undetected, _ = missed(kind, list(KINDS).index(kind), few=True)
    assert not undetected
    checkpoint = from_live(module_of(kind, 0))
    inputs = sample_inputs(checkpoint.model, LENGTH)
    errors = running_error(exact_outputs_of(checkpoint.model, inputs), library_outputs_of(checkpoint, inputs))
    assert errors[8] < 1e-13  # ours and the library's begin as close as float64 is
    monkeypatch.setattr(memory_module, "NORM_EPS", 1e-6)
    assert is_found(checkpoint, inputs)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_finds_every_fault(kind: str, seed: int) -> None:
    undetected, count = missed(kind, seed, few=False)
    assert count > 50
    assert not undetected


# ---- limits ----


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return from_live(make(False, 0)).model


def grown(count: int, doubling: float) -> np.ndarray:
    """Differences that double every `doubling` positions, from a rounding error to the size of the outputs."""
    return np.minimum(2.0**-23 * 2.0 ** (np.arange(count) / doubling), 4.0)


class TestLimits:
    def test_a_horizon_and_a_rate(self, model: StreamModel) -> None:
        right = np.full((400, 32), 2.0)
        limits = limits_from(model, right, grown(400, 10.0))
        assert limits.stability is not None
        # 16 times the difference, rounded up to a power of two times 1e-4, is above 2 % of 1 from there on.
        assert limits.stability.horizon == pytest.approx(127, abs=10)
        assert limits.stability.doubling == pytest.approx(10.0, rel=0.02)
        assert limits.tolerance <= 0.02
        each = limits.at(0, 400)
        assert (each >= np.minimum(16 * grown(400, 10.0), 64)).all()
        assert (each <= np.maximum(TOLERANCE, 32 * grown(400, 10.0))).all()
        assert (np.diff(each) >= 0).all()
        assert (limits.at(390, 20)[10:] == np.inf).all()  # not measured

    def test_values_that_are_not_finite_have_no_limit(self, model: StreamModel) -> None:
        measured = grown(100, 10.0)
        measured[60:] = np.inf
        limits = limits_from(model, np.full((100, 32), 2.0), measured)
        assert np.isfinite(limits.at(0, 60)).all()
        assert (limits.at(60, 40) == np.inf).all()
        assert limits.stability is not None
        assert limits.stability.limits[-1].limit is None

    def test_a_stable_model_has_one_tolerance(self, model: StreamModel) -> None:
        right = np.full((100, 32), 2.0)
        limits = stable_limits(model, torch.zeros(1, 100), right, np.full(100, 1e-6), False, print)
        assert limits.stability is None
        assert (limits.at(0, 100) == TOLERANCE).all()

    def test_two_updates(self, model: StreamModel) -> None:
        # Chunks of 4 rows; 2 longterm rows follow 8 tokens.
        assert shortest_horizon(model) == 8


def test_float32_within_the_horizon_and_rounding_beyond() -> None:
    """Rounding explains float32, but neither a difference from the start nor one of another size."""
    checkpoint = from_live(make(True, 1))
    inputs = sample_inputs(checkpoint.model, 160)
    right, single = exact_outputs_of(checkpoint.model, inputs), outputs_of(checkpoint.model, inputs)
    own = running_error(single, right)
    limits = measured_limits(checkpoint.model, inputs, right, 0 * own)  # from simulated errors alone
    assert limits.stability is not None
    assert 16 < limits.stability.horizon < 160
    assert limits.stability.doubling is not None
    assert (own <= limits.at(0, 160)).all()
    with torch.no_grad():
        checkpoint.model.get_parameter("head.weight").mul_(1.001)
    wrong = running_error(outputs_of(checkpoint.model, inputs), right)
    assert np.flatnonzero(wrong > limits.at(0, 160))[0] < 4


# ---- bundles ----


@pytest.fixture(scope="module")
def chaotic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    bundle = tmp_path_factory.mktemp("chaotic") / "m.titans"
    report = export_loaded(from_live(make(True, 1)), bundle, chunks_per_call=1, positions=160)
    assert report.stability is not None
    assert report.library_error is not None
    return bundle


@pytest.mark.long
def test_a_chaotic_model_is_exported_with_its_horizon(chaotic: Path) -> None:
    stability = read_bundle(chaotic).manifest.stability
    assert stability is not None
    info = json.loads(invoke("inspect", chaotic, "--json").out)
    assert info["stability"] == stability.to_json()
    assert f"exact over {stability.horizon} tokens; beyond" in invoke("inspect", chaotic).out
    report = json.loads(invoke("verify", chaotic, "--json").out)
    assert report["passed"]
    assert report["stability"] == stability.to_json()
    assert report["max_abs_error"] > report["tolerance"]  # beyond the horizon


def _numbered(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes whose first output is float32 and can be scaled."""
    known = onnx.shape_inference.infer_shapes(graph).graph.value_info
    floats = {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    kinds = ("MatMul", "Gemm", "Add", "Mul", "Div", "Sigmoid", "Softmax")
    return [node for node in graph.graph.node if node.op_type in kinds and node.output[0] in floats]


def _scale(path: Path, number: int) -> None:
    """Multiplies a node's output by 1.5. Scores of attention are so small that less would change nothing."""
    model = onnx.load(path, load_external_data=False)
    node = _numbered(model)[number]
    name, at = node.output[0], list(model.graph.node).index(node)
    node.output[0] = f"{name}.altered"
    model.graph.initializer.append(onnx.helper.make_tensor("altered.by", onnx.TensorProto.FLOAT, [], [1.5]))
    model.graph.node.insert(at + 1, onnx.helper.make_node("Mul", [f"{name}.altered", "altered.by"], [name]))
    path.write_bytes(model.SerializeToString())


def _faults(chaotic: Path, tmp_path: Path, every: int) -> tuple[list[str], int]:
    """Altered nodes of every graph that `check_calls` misses, and their number."""
    checkpoint = from_live(make(True, 1))
    model, graphs = checkpoint.model, checkpoint.model.graphs(1)
    inputs = sample_inputs(model, 160)
    check_calls(chaotic, model, graphs, inputs)  # falsely refused otherwise
    undetected, count = [], 0
    for graph in graphs:
        nodes = _numbered(onnx.load(chaotic / f"{graph.name}.onnx", load_external_data=False))
        for number in range(0, len(nodes), every):
            copy = Path(shutil.copytree(chaotic, tmp_path / f"{graph.name}{number}"))
            _scale(copy / f"{graph.name}.onnx", number)
            count += 1
            try:
                check_calls(copy, model, [graph], inputs)
                undetected.append(f"{graph.name}: {nodes[number].op_type} {nodes[number].name}")
            except MismatchError as error:
                assert error.code == "TITANS-E0901"
            shutil.rmtree(copy)
    return undetected, count


@pytest.mark.long
def test_altered_nodes_are_found(chaotic: Path, tmp_path: Path) -> None:
    undetected, count = _faults(chaotic, tmp_path, every=40)
    assert count >= 3
    assert not undetected


@pytest.mark.sweep
def test_every_altered_node_is_found(chaotic: Path, tmp_path: Path) -> None:
    undetected, count = _faults(chaotic, tmp_path, every=1)
    assert count > 50
    assert not undetected


def test_a_horizon_of_less_than_two_updates() -> None:
    model = from_live(make(True, 1)).model
    inputs = sample_inputs(model, 24)
    right = exact_outputs_of(model, inputs)
    own = np.full(24, 1e-6)
    own[4:] = 1.0
    with pytest.raises(MismatchError, match=r"over 4 tokens.*--accept-unstable") as raised:
        stable_limits(model, inputs, right, own, False, print)
    assert raised.value.code == "TITANS-E0251"
    limits = stable_limits(model, inputs, right, own, True, print)
    assert limits.stability is not None
    assert limits.stability.horizon == 4


@pytest.mark.long
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_a_tolerance_of_the_user_applies_within_the_horizon(chaotic: Path, tolerance: float) -> None:
    manifest = read_bundle(chaotic).manifest
    assert manifest.stability is not None
    horizon = manifest.stability.horizon
    each = limits_of(manifest, tolerance).at(0, 160)
    assert (each[:horizon] == tolerance).all()
    assert (each[horizon:] >= limits_of(manifest).at(horizon, 160 - horizon)).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [{"horizon": 161}, {"limits": []}, {"limits": [{"start": 1, "limit": 1e-4}]}, {"doubling": "fast"}]
    + [{"limits": [{"start": 0, "limit": 1e-3}, {"start": 4, "limit": second}]} for second in (1e-3, 1e-4, -1.0)],
)
def test_a_wrong_stability_is_refused(chaotic: Path, change: dict[str, Any]) -> None:
    from titans_export.errors import BundleError
    from titans_export.manifest import parse_manifest

    values = json.loads((chaotic / "manifest.json").read_text())
    values["stability"] |= change
    with pytest.raises(BundleError, match="stability"):
        parse_manifest(json.dumps(values))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(3))
def test_the_reported_model_decodes_its_prompt(seed: int, tmp_path: Path) -> None:
    titans_runtime = pytest.importorskip("titans_runtime", exc_type=ImportError)
    module = reported(seed)
    report = export_loaded(from_live(module), tmp_path / "m.titans", chunks_per_call=1, positions=512)
    assert report.stability is None or report.stability.horizon >= 130
    tokens = torch.randint(0, 256, (130,), generator=torch.Generator().manual_seed(seed))
    right = parallel_forward(module, tokens).numpy()
    with titans_runtime.Session(tmp_path / "m.titans") as session:
        got = session.stream().feed(tokens.numpy().astype(np.int32))
    assert (got.argmax(-1) == right.argmax(-1)).all()
    assert np.abs(got - right).max() < max(report.tolerance, TOLERANCE)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(12))
def test_random_models_are_exported(seed: int, tmp_path: Path) -> None:
    streams, residual = (1, 2, 4)[seed % 3], bool(seed & 1)
    module = make(
        seed % 4 > 0, seed, num_residual_streams=streams, neural_mem_weight_residual=residual, depth=2 + seed % 2
    )
    report = export_loaded(from_live(module), tmp_path / "m.titans", chunks_per_call=2, positions=256)
    assert report.stability is None or report.stability.horizon >= shortest_horizon(from_live(module).model)
