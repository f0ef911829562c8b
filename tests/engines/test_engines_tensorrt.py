"""Full TensorRT, by a stand-in that knows our plugin and has TensorRT-RTX behind it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engine_tools import TensorRTDouble

from titans_export.bundle import read_bundle
from titans_export.engines import build as building
from titans_export.engines import graphs, tensorrt
from titans_export.engines.build import Report, build_engine
from titans_export.engines.machine import Gpu, Machine
from titans_export.engines.messages import BuildError
from titans_export.engines.plan import Request
from titans_export.engines.targets import TARGETS
from titans_export.errors import MachineError

trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
pytest_plugins = ["export_fixtures"]
ORIN = Machine("linux-aarch64", [Gpu("Orin", 87, 32 << 30)], 12060)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.so"
    path.touch()
    return path


@pytest.fixture
def on_orin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "this_machine", lambda: ORIN)


def build(bundle: Path, double: TensorRTDouble, library: Path, **more: Any) -> tuple[Report, Path]:
    graph = more.pop("graph", "decode")
    request = Request("orin-agx", graphs=(graph,), plugin_library=library, **more)
    output = library.parent / "out.titans"
    return build_engine(bundle, request, output=output, overwrite=True, vendor=double), output


@pytest.fixture
def mac(bundles: dict[str, Path]) -> Path:
    return bundles["mac"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_from_plugin_nodes_to_an_engine(
    bundles: dict[str, Path], library: Path, on_orin: None, variant: str, precision: str
) -> None:
    double = TensorRTDouble(trt, bundles[variant])
    report, output = build(bundles[variant], double, library, precision=precision)
    bundle = read_bundle(output)
    (engine,) = bundle.manifest.raw["engines"]
    memories = [entry.name for entry in bundle.manifest.state if entry.role == "memory"]
    assert engine == report.engine == {
        "name": f"orin-agx-{precision}", "target": "orin-agx", "compiler": "tensorrt", "compiler_version": "10.3.0",
        "precision": precision, "device": "cuda", "sm": [87], "platform": "linux-aarch64", "cuda": "12.6",
        "driver": 12060, "memory": "plugin", "alias": "undeclared", "state_in_place": memories,
        "plugin": {"name": "NeuralMemory", "namespace": "ai.titans", "version": "1"},
        "graphs": [{"graph": "decode", "file": f"orin-agx-{precision}.decode.engine"}],
    }  # fmt: skip
    updates = [node for node in double.seen.nodes if node["mode"] == "update"]
    assert len(updates) == len(memories)
    assert {node["alias"] for node in updates} == {"undeclared"}
    assert {node["overload"] for node in double.seen.nodes} == {""}
    assert double.seen.libraries[0] == str(library)
    assert not double.seen.preview
    assert double.seen.tf32 is False
    assert double.seen.pools == {"WORKSPACE": report.workspace}
    assert report.graphs[0]["engine_layers"] == ["first", "second"]
    assert double.seen.opened == [report.graphs[0]["bytes"]]


@pytest.mark.parametrize(("alias", "preview"), [("declared", True), ("undeclared", False), ("two-buffers", False)])
def test_the_three_ways_of_one_buffer(mac: Path, library: Path, on_orin: None, alias: str, preview: bool) -> None:
    double = TensorRTDouble(trt, mac)
    report, _ = build(mac, double, library, alias=alias)
    assert double.seen.preview == ({"ALIASED_PLUGIN_IO_10_03": True} if preview else {})
    assert {node["alias"] for node in double.seen.nodes if node["mode"] == "update"} == {alias}
    assert report.engine["alias"] == alias
    assert bool(report.engine["state_in_place"]) == (alias != "two-buffers")


def test_an_aligned_graph_has_no_fill(mac: Path, library: Path, on_orin: None) -> None:
    double = TensorRTDouble(trt, mac)
    request = Request("orin-agx", plugin_library=library, graphs=("chunk", "decode"))
    report = build_engine(mac, request, output=library.parent / "out.titans", vendor=double)
    assert [entry["graph"] for entry in report.engine["graphs"]] == ["chunk", "decode"]
    updates = [node for node in double.seen.nodes if node["mode"] == "update"]
    assert {(node["schedule"], "fill" in node["inputs"].split(",")) for node in updates} == {
        ("aligned", False), ("any", True),
    }  # fmt: skip


def test_the_plugin_s_library_into_the_engine(mac: Path, library: Path, on_orin: None) -> None:
    double = TensorRTDouble(trt, mac)
    report, _ = build(mac, double, library, embed_plugin=True)
    assert "for other programs" in report.notes[0]
    assert double.seen.serialized == [str(library)]
    assert double.seen.libraries == [str(library)], "loaded again to open an engine that brings it"


def test_timing_caches(mac: Path, library: Path, on_orin: None) -> None:
    cache = library.parent / "timings"
    double = TensorRTDouble(trt, mac)
    build(mac, double, library, timing_cache=cache)
    build(mac, double, library, timing_cache=cache)
    assert double.seen.caches == [b"", b"timings"]
    assert cache.read_bytes() == b"timings"
    cache.write_bytes(b"another device")
    with pytest.raises(MachineError, match="timing cache"):
        build(mac, double, library, timing_cache=cache)
    assert cache.read_bytes() == b"another device"


def test_a_library_without_our_plugin(mac: Path, library: Path, on_orin: None) -> None:
    double = TensorRTDouble(trt, mac)
    builder = double.Builder

    class Builder(builder):  # type: ignore[misc, valid-type]
        def get_plugin_registry(self) -> Any:
            return type("Registry", (), {"load_library": lambda *_: object(), "all_creators": []})()

    double.Builder = Builder
    with pytest.raises(MachineError, match="does not register ai"):
        build(mac, double, library)


def test_an_engine_that_does_not_open(mac: Path, library: Path, on_orin: None) -> None:
    double = TensorRTDouble(trt, mac)
    runtime = double.Runtime

    class Runtime(runtime):  # type: ignore[misc, valid-type]
        def deserialize_cuda_engine(self, plan: Any) -> None:
            return None

    double.Runtime = Runtime
    with pytest.raises(BuildError, match="does not open on this device"):
        build(mac, double, library)
    assert not (library.parent / "out.titans").exists()


@pytest.mark.parametrize(
    ("version", "target", "right"),
    [
        ("10.2.0", "orin-agx", False),
        ("10.3.0", "orin-agx", True),
        ("11.4.1", "orin-agx", True),
        ("12.0.0", "orin-agx", False),
        ("10.12.0", "thor", False),
        ("10.13.3", "thor", True),
        ("10.7.0", "b200", False),
        ("10.13.0", "dgx-spark", False),
    ],
)
def test_releases(version: str, target: str, right: bool) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    if right:
        tensorrt.check(module, TARGETS[target])
    else:
        with pytest.raises(MachineError, match=f"got {version}"):
            tensorrt.check(module, TARGETS[target])


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine("linux-x86_64"), "linux-x86_64 with no NVIDIA GPU"),
        (Machine("linux-aarch64"), "linux-aarch64 with no NVIDIA GPU"),
        (Machine("linux-aarch64", [Gpu("Thor", 110, 1)]), r"sm_110 \(Thor\)"),
        (Machine("linux-x86_64", [Gpu("Orin", 87, 1)]), "linux-x86_64"),
    ],
)
def test_it_builds_on_the_device_alone(machine: Machine, words: str) -> None:
    with pytest.raises(MachineError, match=f"{words}.*run this command on the Jetson AGX Orin.*--emit-trtexec"):
        tensorrt.check_machine(TARGETS["orin-agx"], machine)
    tensorrt.check_machine(TARGETS["orin-agx"], ORIN)


def test_where_the_plugin_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tensorrt.ENVIRONMENT, str(tmp_path / "named.so"))
    with pytest.raises(MachineError, match=r"at .*named\.so"):
        tensorrt.plugin_library(None, 10)
    (tmp_path / "named.so").touch()
    assert tensorrt.plugin_library(None, 10) == tmp_path / "named.so"
    with pytest.raises(MachineError, match=r"libtitans_tensorrt_plugin_11\.so"):
        tensorrt.plugin_library(tmp_path / "none.so", 11)


def test_alias_needs_a_memory_that_may_share(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "in_place", lambda models, state: [])
    plan = building.make_plan(read_bundle(bundles["mac"]), Request("orin-agx", alias="declared"))
    assert (plan.alias, plan.in_place) == ("two-buffers", [])
