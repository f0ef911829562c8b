"""Engines for ONNX Runtime compute what the graphs compute, with our kernel and without, and hold no weight twice."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_tools import session, stream_logits
from onnx.external_data_helper import uses_external_data
from tolerances import TOLERANCES

from titans_export.bundle import Bundle, read_bundle
from titans_export.engines.build import build_engine
from titans_export.engines.onnxruntime import kernel_library
from titans_export.engines.plan import Request
from titans_export.errors import MachineError
from titans_export.onnx.nodes import is_memory

pytest_plugins = ["export_fixtures"]
VARIANTS = ("mac", "mag", "mal", "lmm")
STREAM = 60


@pytest.fixture
def kernel() -> Path:
    try:
        return kernel_library()
    except (ImportError, MachineError) as error:
        pytest.skip(f"the memory's kernel is not built: {error}")


def logits(bundle: Bundle, kernel: Path | None) -> np.ndarray:
    (engine,) = bundle.manifest.engines
    sessions = {own.graph: session(bundle.path / own.file, kernel) for own in engine.graphs}
    return stream_logits(bundle, sessions, STREAM)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_for_the_cpu(bundles: dict[str, Path], kernel: Path, variant: str, tmp_path: Path) -> None:
    output = tmp_path / "out.titans"
    report = build_engine(bundles[variant], Request("cpu"), output=output)
    bundle = read_bundle(output)
    golden = bundle.golden().values[:STREAM]
    for library in (kernel, None):
        assert np.abs(logits(bundle, library) - golden).max() <= TOLERANCES["cpu", "float32"]
    assert (report.engine["memory"], report.engine["device"], report.engine["sm"]) == ("either", "cpu", [])
    for entry, graph in zip(report.engine["graphs"], bundle.manifest.graphs, strict=True):
        before = onnx.load(str(output / graph.file), load_external_data=False)
        after = onnx.load(str(output / entry["file"]), load_external_data=False)
        assert len(after.graph.node) < len(before.graph.node), "nothing was optimised"
        assert sum(map(is_memory, after.graph.node)) == sum(map(is_memory, before.graph.node))
        inside = sum(len(t.raw_data) for t in after.graph.initializer if not uses_external_data(t))
        assert inside < 0.25 * (output / "weights.safetensors").stat().st_size
        shared = {t.name for t in after.graph.initializer if uses_external_data(t)}
        assert shared == set(entry["weights"])
        assert len(shared & set(graph.weights)) > 0.5 * len(graph.weights)
        # What a CPU's instruction set decides is left to the session.
        assert not {node.domain for node in after.graph.node} - {"", "ai.titans", "com.microsoft"}


def test_for_cuda(bundles: dict[str, Path], kernel: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.titans"
    report = build_engine(bundles["mac"], Request("h100", "fp16", compiler="onnxruntime"), output=output)
    bundle = read_bundle(output)
    assert (report.engine["memory"], report.engine["driver"], report.engine["sm"]) == ("either", None, [90])
    golden = bundle.golden().values[:STREAM]
    error = np.abs(logits(bundle, kernel) - golden).max()
    assert bundle.tolerance < error <= TOLERANCES["products", "fp16"] * np.abs(golden).max()


def test_without_the_kernel(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = pytest.importorskip("titans_runtime._library", reason="the runtime is not built", exc_type=ImportError)
    monkeypatch.setattr(library, "_library_path", lambda: str(tmp_path / "libtitans.so"))
    with pytest.raises(MachineError, match="no memory kernel for ONNX Runtime"):
        build_engine(bundles["lmm"], Request("cpu"), output=tmp_path / "out.titans")
    assert not (tmp_path / "out.titans").exists()


def test_the_runtime_takes_it(bundles: dict[str, Path], kernel: Path, tmp_path: Path) -> None:
    rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    if "engine" not in inspect.signature(rt.Session).parameters:
        pytest.skip("the installed runtime knows no engines: make setup")
    output = tmp_path / "out.titans"
    build_engine(bundles["mac"], Request("cpu"), output=output)
    golden = read_bundle(output).golden()
    tokens, golden = golden.inputs, golden.values
    for memory_kernel in ("require", "off"):
        with rt.Session(output, engine="cpu-fp32", memory_kernel=memory_kernel) as session:
            assert session.info["engine"] == "cpu-fp32"
            logits = session.stream().feed(tokens)
        assert np.abs(logits - golden).max() <= TOLERANCES["cpu", "float32"]
