"""Engines of real models, really built by TensorRT-RTX, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titans_export.bundle import read_bundle
from titans_export.engines import graphs, tensorrt_rtx
from titans_export.engines.build import build_engine
from titans_export.engines.plan import Request
from titans_export.engines.precision import lower_precision
from titans_export.engines.vendor import Settings, build_plan
from titans_export.onnx.files import load_graph
from titans_export.onnx.graphs import SLOTS_INPUT
from titans_export.onnx.mapped import write_graph
from titans_export.onnx.streams import fix_streams

trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
pytest_plugins = ["export_fixtures"]
VARIANTS, PRECISIONS = ("mac", "mag", "mal", "lmm"), ("fp32", "fp16", "bf16")


def prepare(path: Path, precision: str, folder: Path, streams: int = 1) -> Path:
    source = load_graph(path)
    fix_streams(source, SLOTS_INPUT, streams)
    model = graphs.inline(lower_precision(source, precision, memory=False))
    return write_graph(model, folder / path.name)


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_for_every_capability(
    bundles: dict[str, Path], variant: str, precision: str, tmp_path: Path
) -> None:
    """Of 1 and of 8 streams. Strongly typed, so a type that is not as it should be is an error of the parser's."""
    paths = read_bundle(bundles[variant]).graph_paths()
    names = ("prefill", "chunk", "decode") if precision == "fp16" else ("chunk", "decode")
    many = "chunk" if precision == "bf16" else "decode"
    for name in names:
        path = prepare(paths[name], precision, tmp_path, streams=8 if name == many else 1)
        built = build_plan(trt, path, Settings(capabilities=tensorrt_rtx.CAPABILITIES))
        assert len(built.plan) > path.with_suffix(".data").stat().st_size
        assert built.layers["matrix_multiply"] > 0
        assert not built.layers.get("plugin_v3")


@pytest.mark.slow
def test_one_capability_at_a_time(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = prepare(read_bundle(bundles["mac"]).graph_paths()["decode"], "fp16", tmp_path)
    capabilities = tensorrt_rtx.CAPABILITIES
    plans = [bytes(build_plan(trt, path, Settings(capabilities=(sm,))).plan) for sm in capabilities]
    assert len(set(plans)) == len(capabilities), "an engine that does not know what it is for"


@pytest.mark.slow
def test_low_products_are_smaller_engines(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = read_bundle(bundles["mac"]).graph_paths()["decode"]
    sizes = {p: prepare(path, p, tmp_path).with_suffix(".data").stat().st_size for p in PRECISIONS}
    assert sizes["fp16"] == sizes["bf16"] < 0.6 * sizes["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx-30", "rtx-50", "a100"])
def test_into_a_bundle(bundles: dict[str, Path], target: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.titans"
    report = build_engine(
        bundles["lmm"], Request(target, "fp16", compiler="tensorrt_rtx", graphs=("decode",)), output=copy
    )
    bundle = read_bundle(copy)
    (engine,) = bundle.manifest.raw["engines"]
    assert engine == report.engine
    assert engine["sm"] == [{"rtx-30": 86, "rtx-50": 120, "a100": 80}[target]]
    assert (engine["memory"], engine["plugin"], engine["alias"]) == ("standard-operators", None, None)
    assert (engine["device"], engine["state_in_place"]) == ("cuda", [])
    assert engine["driver"] == 1000 * int(engine["cuda"].split(".")[0]) >= 12000
    file = copy / engine["graphs"][0]["file"]
    assert file.stat().st_size == bundle.manifest.files[file.name].bytes == report.graphs[0]["bytes"]
    assert not read_bundle(bundles["lmm"]).manifest.engines
