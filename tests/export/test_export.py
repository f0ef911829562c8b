"""Export: the bundle computes what PyTorch computes, and is the same bytes wherever it is made."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from tolerances import TOLERANCES
from variants import CONFIGS

from titans_export import exporting
from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans import load
from titans_export.errors import MismatchError, OutputError, UsageError
from titans_export.exporting import export_checkpoint
from titans_export.model import Titans
from titans_export.onnx import graphs, parts
from titans_export.onnx.graphs import trace_graph
from titans_export.onnx.nodes import attribute, is_memory
from titans_export.onnx.tracing import trace_ir
from titans_export.operators import DOMAIN
from titans_export.stability import RunningError
from titans_export.verifying import PyTorch, verify_stream

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

pytest_plugins = ["export_fixtures"]

TOLERANCE = TOLERANCES["cpu", "float32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "length"),
    [
        pytest.param(variant, length, marks=[pytest.mark.long] * (length > 2_000 and variant != "mac"))
        for variant in CONFIGS
        for length in (10_000, 2_000)
        if (variant, length) != ("mac", 2_000)
    ],
)
def test_long_streams_equal_pytorch_however_they_are_cut(
    variant: str, length: int, checkpoints: dict[str, Path], bundles: dict[str, Path]
) -> None:
    tokens = np.random.default_rng(5).integers(0, 61, length).astype(np.int32)
    with rt.Session(bundles[variant], threads=1) as session:
        report = verify_stream(session, tokens, PyTorch(load(checkpoints[variant]).model), TOLERANCE)
    assert report.positions == length
    assert set(report.feeds) == {"whole", "token_by_token", "random_cuts"}
    assert report.passed, (report.max_abs_error, report.first_bad_position)
    assert report.pytorch_float32_to_float64 is not None
    assert 0 < report.pytorch_float32_to_float64 < TOLERANCE


def test_frozen_streams_equal_pytorch(checkpoints: dict[str, Path], bundles: dict[str, Path]) -> None:
    tokens = np.random.default_rng(6).integers(0, 61, 150).astype(np.int32)
    for variant, path in bundles.items():
        model = load(checkpoints[variant]).model
        batch = torch.from_numpy(tokens.astype(np.int64))[None]
        first, state = model.feed(batch[:, :77], model.initial_state(1), 0)
        second, state = model.feed(batch[:, 77:110], state, 77, learn=False)
        third, _ = model.feed(batch[:, 110:], state, 110)
        expected = torch.cat([first, second, third], 1)[0].numpy()
        with rt.Session(path, threads=1) as session:
            stream = session.stream()
            rows = [stream.feed(tokens[:77])]
            stream.freeze()
            rows.append(stream.feed(tokens[77:110]))
            stream.resume()
            rows.append(stream.feed(tokens[110:]))
        assert np.abs(np.concatenate(rows) - expected).max() < TOLERANCE
        learned = model.feed(batch, model.initial_state(1), 0)[0][0].numpy()
        assert np.abs(learned - expected)[80:].max() > 10 * TOLERANCE, "freezing changes nothing in this test"


def test_memory_is_w_of_pytorch(checkpoints: dict[str, Path], bundles: dict[str, Path]) -> None:
    from titans_export.model.neural_memory import memory_layout

    tokens = np.random.default_rng(7).integers(0, 61, 64).astype(np.int32)
    for variant, path in bundles.items():
        model = load(checkpoints[variant]).model
        _, state = model.feed(torch.from_numpy(tokens.astype(np.int64))[None], model.initial_state(1), 0)
        with rt.Session(path, threads=1) as session:
            stream = session.stream()
            stream.feed(tokens, outputs="none")
            memory = stream.memory()
        fields = memory_layout(model.config.memory.spec).unpack(state["layers.0.memory"])
        for name in ("W0", "S0"):
            got, expected = memory[f"layers.0.memory.{name}"], fields[name].numpy()
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max()


def test_one_update_node_per_memory_layer_and_a_body_for_each(bundles: dict[str, Path]) -> None:
    for variant, path in bundles.items():
        config = CONFIGS[variant]
        layers = sum(config.has_memory(i) for i in range(config.layers))
        for graph in read_bundle(path).manifest.graphs:
            model = onnx.load(path / graph.file)
            onnx.checker.check_model(path / graph.file, full_check=False)
            nodes = [n for n in model.graph.node if n.domain == DOMAIN]
            modes = [attribute(n, "mode") for n in nodes if is_memory(n)]
            # MAC's attention stands between the chunks of a layer, so there it is one node a chunk.
            calls = max(1, graph.tokens // config.memory.chunk) if variant == "mac" else 1
            assert modes.count("update") == layers * calls
            assert modes.count("read") == (layers * calls if variant == "mac" else 0)
            assert {n.overload for n in nodes} == {f.overload for f in model.functions}
            assert all(n.domain in ("", DOMAIN) for f in model.functions for n in f.node)


def _wiring(model: onnx.ModelProto) -> list[object]:
    """Nodes in order, with values numbered by first use. Initialisers have their names, or their bytes if small."""
    numbers: dict[str, object] = {"": ""}
    for tensor in model.graph.initializer:
        numbers[tensor.name] = tensor.name if tensor.external_data else onnx.numpy_helper.to_array(tensor).tobytes()

    def number(name: str) -> object:
        return numbers.setdefault(name, len(numbers))

    wiring: list[object] = []
    for node in model.graph.node:
        given = [a.SerializeToString() for a in node.attribute]
        wiring.append((node.op_type, node.overload, [*map(number, node.input)], given, [*map(number, node.output)]))
    return [*wiring, *(number(value.name) for value in model.graph.output)]


def test_layers_traced_once_give_the_graph_of_a_whole_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Titans(replace(CONFIGS["mac"], layers=3, memory_layers=(0, 2))).eval()
    graph = next(graph for graph in model.graphs(1) if graph.name == "decode")
    traced: list[int] = []

    def counted(*args: object) -> object:
        traced.append(1)
        return trace_ir(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(parts, "trace_ir", counted)
    once = trace_graph(model, graph)
    assert len(traced) == 2  # layers with a memory, layers without
    monkeypatch.setattr(graphs, "collected_parts", lambda: nullcontext({}))
    whole = trace_graph(model, graph)
    assert len(traced) == 2
    assert _wiring(once.proto) == _wiring(whole.proto)
    assert {name: value.shape for name, value in once.large.items()} == {
        name: value.shape for name, value in whole.large.items()
    }
    for name, value in once.large.items():
        parameter = dict(model.named_parameters()).get(name.removeprefix("model."))
        if parameter is not None:
            assert np.shares_memory(value, parameter.detach().numpy())


def test_weights_are_stored_once(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    for variant, path in bundles.items():
        shared = load_file(path / "weights.safetensors")
        for name, value in load(checkpoints[variant]).model.state_dict().items():
            if f"model.{name}" in shared:
                assert np.array_equal(shared[f"model.{name}"], value.numpy())
        for graph in read_bundle(path).manifest.graphs:
            model = onnx.load(path / graph.file, load_external_data=False)
            external = {t.name for t in model.graph.initializer if t.external_data}
            assert external == set(graph.weights) <= set(shared)
            inline = sum(len(t.raw_data) for t in model.graph.initializer if not t.external_data)
            assert inline < 16_384


def test_each_graph_runs_in_a_plain_onnxruntime(bundles: dict[str, Path]) -> None:
    """No custom operator, no runtime of ours: the function bodies and the shared file of weights are enough."""
    import onnxruntime

    path = bundles["mac"]
    bundle = read_bundle(path)
    golden = bundle.golden()
    tokens, logits = golden.inputs, golden.values
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for graph in bundle.manifest.graphs:
        session = onnxruntime.InferenceSession(path / graph.file, options, providers=["CPUExecutionProvider"])
        count = graph.tokens
        inputs = {"tokens": tokens[None, :count].astype(np.int64), "position": np.zeros(1, np.int64)}
        inputs |= {"learn": np.ones(1, bool), "slots": np.zeros(1, np.int64)}
        got = session.run(["logits"], {**inputs, **bundle.initial_state()})[0]
        assert np.abs(got[0] - logits[:count]).max() < TOLERANCE


def test_chunks_per_call_sets_the_unroll(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    graphs = {g.name: (g.tokens, g.stride) for g in read_bundle(bundles["lmm"]).manifest.graphs}
    assert graphs == {"prefill": (24, 8), "chunk": (8, 8), "decode": (1, 1)}
    export_checkpoint(checkpoints["lmm"], tmp_path / "one.titans", chunks_per_call=1, positions=20)
    graphs = {g.name: (g.tokens, g.stride) for g in read_bundle(tmp_path / "one.titans").manifest.graphs}
    assert graphs == {"chunk": (8, 8), "decode": (1, 1)}


@pytest.mark.long
def test_same_input_same_bytes(checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path) -> None:
    """Another process, folder, hash seed and number of threads: every file of the bundle is the same."""
    output = tmp_path / "elsewhere" / "mac.titans"
    output.parent.mkdir()
    command = (
        "import sys; from pathlib import Path; from titans_export.exporting import export_checkpoint as export; "
        "export(Path(sys.argv[1]), Path(sys.argv[2]), chunks_per_call=3, positions=100)"
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(
        [sys.executable, "-c", command, str(checkpoints["mac"]), str(output)], check=True, cwd=tmp_path, env=environment
    )

    def digests(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

    assert digests(output) == digests(bundles["mac"])


def test_no_path_of_this_machine_is_in_a_bundle(bundles: dict[str, Path]) -> None:
    here = [str(Path(exporting.__file__).parent), str(Path(torch.__file__).parent), sys.prefix, "site-packages"]
    for path in bundles.values():
        for file in path.iterdir():
            data = file.read_bytes()
            assert not [place for place in here if place.encode() in data], file


def test_golden_outputs_are_those_of_float64(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    for variant, path in bundles.items():
        golden = read_bundle(path).golden()
        tokens, logits = golden.inputs, golden.values
        model = load(checkpoints[variant]).model.double()
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
        assert len(tokens) == 100
        assert np.abs(logits - expected).max() <= 2.0**-17 + 1e-9


def _off_by(difference: float) -> type[RunningError]:
    class Off(RunningError):
        def add(self, outputs: npt.NDArray[Any]) -> None:
            super().add(outputs + np.float32(difference))

    return Off


def test_a_mismatch_leaves_no_bundle(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "RunningError", _off_by(2e-4))
    with pytest.raises(MismatchError, match="position 0") as caught:
        export_checkpoint(checkpoints["lmm"], tmp_path / "x.titans", chunks_per_call=1, positions=20)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_nan_from_the_runtime_is_a_mismatch(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "RunningError", _off_by(np.nan))
    with pytest.raises(MismatchError):
        export_checkpoint(checkpoints["lmm"], tmp_path / "x.titans", chunks_per_call=1, positions=20)


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_only_a_bundle_is_ever_overwritten(checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / ("config.json" if kind == "checkpoint" else "thesis.txt")).write_text("precious")
    with pytest.raises(OutputError, match="another name"):
        export_checkpoint(checkpoints["lmm"], target, overwrite=True, chunks_per_call=1, positions=20)
    kept = target if kind == "file" else next(target.iterdir())
    assert kept.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


def test_overwriting_through_a_link_leaves_the_link(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    real, link = tmp_path / "real.titans", tmp_path / "link.titans"
    export_checkpoint(checkpoints["lmm"], real, chunks_per_call=1, positions=20)
    link.symlink_to(real)
    export_checkpoint(checkpoints["lmm"], link, overwrite=True, chunks_per_call=1, positions=40)
    assert link.is_symlink()
    assert len(read_bundle(link).golden().inputs) == 40
    assert sorted(tmp_path.iterdir()) == [link, real]


@pytest.mark.parametrize(("chunks", "positions"), [(1, 1), (4, 10), (4, 1024), (16, 1024), (16, 100)])
def test_the_comparison_runs_every_graph(chunks: int, positions: int) -> None:
    graphs = Titans(CONFIGS["lmm"]).graphs(chunks)
    cuts = exporting._cuts(graphs, positions)
    assert sum(cuts) >= positions
    used, at = set(), 0
    for cut in cuts:
        end = at + cut
        while at < end:
            graph = next(g for g in graphs if g.tokens <= end - at and at % g.stride == 0)
            used.add(graph.name)
            at += graph.tokens
    assert used == {graph.name for graph in graphs}


def test_an_existing_bundle_is_kept_unless_told_otherwise(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    before = json.loads((bundles["mac"] / "manifest.json").read_text())
    with pytest.raises(OutputError, match="--overwrite"):
        export_checkpoint(checkpoints["lmm"], bundles["mac"], positions=20)
    assert json.loads((bundles["mac"] / "manifest.json").read_text()) == before
    with pytest.raises(UsageError):
        export_checkpoint(checkpoints["lmm"], tmp_path / "y.titans", chunks_per_call=0)
