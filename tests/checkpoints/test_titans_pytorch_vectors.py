"""A bare NeuralMemory whose memory no kernel covers: engines, precisions, and what the session says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from library_models import memory

from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans_pytorch import from_live
from titans_export.engines.build import build_engine
from titans_export.engines.plan import Request
from titans_export.engines.precision import lower_precision
from titans_export.exporting import export_loaded, export_module

pytest.importorskip("titans_pytorch")
rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "order2.titans"
    report = export_module(memory(momentum_order=2), path, chunks_per_call=1, positions=40)
    assert report.library_error is not None and report.library_error < 1e-6
    return path


def test_the_session_says_that_standard_operators_compute_it(bundle: Path) -> None:
    with rt.Session(bundle, threads=1) as session:
        assert session.info["memory_kernel"] == "standard-operators"
        assert (session.input_kind, session.input_size, session.output_size) == ("vectors", 16, 16)
    with pytest.raises(rt.Error, match="standard operators"):
        rt.Session(bundle, threads=1, memory_kernel="require")


def test_an_engine_for_the_cpu(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine.titans"
    build_engine(bundle, Request("cpu"), output=output)
    golden = read_bundle(output).golden()
    inputs, right = golden.inputs, golden.values
    with rt.Session(output, threads=1, engine="cpu-fp32") as session:
        y = session.stream().feed(inputs)
    assert y is not None
    assert np.abs(y - right).max() <= read_bundle(bundle).tolerance


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_low_precision_leaves_the_memory_s_own_products(bundle: Path, precision: str) -> None:
    model = onnx.load(str(bundle / "chunk.onnx"))
    weights = {tensor.name for tensor in model.graph.initializer}
    low = lower_precision(model, precision, memory=False)
    products = [node for node in low.graph.node if node.op_type in ("MatMul", "Gemm")]
    lowered = [node for node in products if node.output[0].endswith(f".{precision}")]
    assert 0 < len(lowered) < len(products)
    names = {name.removesuffix(f".{precision}") for name in weights}
    for node in lowered:
        assert any(name.removesuffix(f".{precision}") in names for name in node.input)


@pytest.mark.parametrize("options", [{"batch_size": 8, "spectral_norm_surprises": True}, {"momentum_order": 2}])
def test_an_engine_for_rtx_has_the_memory_as_standard_operators(options: dict[str, Any], tmp_path: Path) -> None:
    """Loops and branches included: TensorRT-RTX really builds it."""
    pytest.importorskip("tensorrt_rtx")
    export_loaded(from_live(memory(**options)), tmp_path / "m.titans", chunks_per_call=1, positions=16)
    report = build_engine(tmp_path / "m.titans", Request("rtx-40"), output=tmp_path / "engine.titans")
    assert report.engine["memory"] == "standard-operators"
    assert {graph["graph"] for graph in report.engine["graphs"]} == {"chunk", "decode"}


def test_the_library_s_wrong_last_row_is_not_held_against_the_export(tmp_path: Path) -> None:
    """Of a gated transition, where the stream ends as the gradient point moves."""
    module = memory(gated_transition=True, batch_size=8)
    report = export_loaded(from_live(module), tmp_path / "gated.titans", chunks_per_call=1, positions=16)
    assert report.library_error is not None
    assert report.library_error < 1e-6
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        longer = module(torch.cat([x, x[:, -1:]], 1))[0][:, :16]
        assert (module(x)[0] - longer)[:, -1].abs().max() > 1e-3  # that it is wrong there
