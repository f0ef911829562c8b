"""`titans-export build`: what it refuses, what it says without building, and what it leaves behind."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_tools import command, environment, invoke

from titans_export.bundle import read_bundle
from titans_export.engines import build as building
from titans_export.engines import machine
from titans_export.engines.plan import Request, make_plan
from titans_export.engines.targets import TARGETS
from titans_export.errors import BundleError

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here does not depend on the machine that runs the tests."""
    here = machine.Machine("linux-x86_64")
    monkeypatch.setattr(building, "this_machine", lambda: here)


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_target_is_listed() -> None:
    text = invoke("build", "--list-targets").out
    listed = {target["name"]: target for target in invoke("build", "--list-targets", "--json").json()["targets"]}
    capabilities = dict(
        zip(
            ("orin-nano", "orin-agx", "thor", "dgx-spark", "rtx-30", "rtx-40", "rtx-50", "a100", "l4", "l40s", "h100",
             "h200", "b200", "cpu"),
            (87, 87, 110, 121, 86, 89, 120, 80, 89, 89, 90, 90, 100, None),
            strict=True,
        )
    )  # fmt: skip
    assert {name: target["sm"] for name, target in listed.items()} == capabilities
    for name, target in listed.items():
        assert name in text
        assert target["compilers"][0] in text


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--target", "abacus"), 2, ("abacus", "rtx-40")),
        ((), 2, ("--target",)),
        (("--target", "cpu", "--precision", "fp16"), 2, ("fp32",)),
        (("--target", "rtx-40", "--alias", "declared"), 2, ("--alias", "tensorrt")),
        (("--target", "rtx-40", "--timing-cache", "x"), 2, ("--timing-cache",)),
        (("--target", "rtx-40", "--plugin-library", "x"), 2, ("--plugin-library",)),
        (("--target", "cpu", "--profile", "a=1:1:1"), 2, ("--profile",)),
        (("--target", "cpu", "--workspace-limit", "1"), 2, ("--workspace-limit",)),
        (("--target", "rtx-40", "--profile", "a=1:1"), 2, ("INPUT=MIN:OPT:MAX",)),
        (("--target", "rtx-40", "--profile", "a=0:1:1"), 2, ("at least 1",)),
        (("--target", "rtx-40", "--graph", "none"), 2, ("chunk, decode",)),
        (("--target", "rtx-40", "--graph", "chunk"), 2, ("add --graph decode",)),
        (("--target", "rtx-40", "--name", "../x"), 2, ("--name",)),
        (("--target", "rtx-40", "--name", "none"), 2, ("--name",)),
        (("--target", "rtx-40", "--emit-trtexec"), 2, ("tensorrt_rtx",)),
        (("--target", "rtx-40", "--emit-trtexec", "--dry-run"), 2, ("exclude each other",)),
        (("--target", "rtx-40", "--precision", "int3"), 2, ("int3",)),
        (("--target", "orin-agx"), 4, ("linux-aarch64", "sm_87", "Jetson AGX Orin", "JetPack", "--emit-trtexec")),
        (("--target", "h100"), 4, ("sm_90", "H100", "--emit-trtexec")),
        (("--target", "a100"), 4, ("sm_80", "--compiler tensorrt_rtx")),
        (("--target", "dgx-spark"), 4, ("linux-aarch64", "linux-x86_64", "DGX Spark")),
        (("--target", "orin-agx", "--compiler", "tensorrt_rtx"), 4, ("sm_87", "--compiler tensorrt")),
        (("--target", "thor", "--compiler", "tensorrt_rtx"), 4, ("sm_110", "--compiler tensorrt")),
        (("--target", "h200", "--compiler", "tensorrt_rtx"), 4, ("sm_90", "--compiler tensorrt")),
        (("--target", "b200", "--compiler", "tensorrt_rtx"), 4, ("sm_100", "--compiler tensorrt")),
        (("--target", "orin-nano", "--compiler", "onnxruntime"), 4, ("--compiler tensorrt",)),
        (("--target", "cpu", "--compiler", "tensorrt"), 4, ("--compiler onnxruntime",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(bundle: Path, args: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    before = contents(bundle)
    result = invoke("build", bundle, *args)
    result.check_failure(code, *words)
    assert result.out == ""
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_no_tensorrt_on_the_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.Machine("linux-aarch64", [machine.Gpu("Orin", 87, 1)], 12060)
    monkeypatch.setattr(building, "this_machine", lambda: here)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    invoke("build", bundle, "--target", "orin-agx").check_failure(4, "TensorRT's Python package", "python3-libnvinfer")


def test_no_rtx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    invoke("build", bundle, "--target", "rtx-40").check_failure(4, "pip install 'titans-export[rtx]'")


def test_a_target_without_the_memory(bundle: Path) -> None:
    args = ("build", bundle, "--target", "orin-nano", "--workspace-limit", 9000, "--dry-run")
    assert "which has 8 GiB" in invoke(*args, "--json").json()["memory"]
    invoke(*args[:-1]).check_failure(4, "8 GiB", "--workspace-limit")
    tight = ("build", bundle, "--target", "orin-nano", "--workspace-limit", 5000, "--dry-run", "--json")
    assert "which has 8 GiB" in invoke(*tight).json()["memory"]


@pytest.mark.parametrize("target", TARGETS)
def test_dry_runs_build_nothing(bundle: Path, target: str) -> None:
    before = contents(bundle)
    facts = invoke("build", bundle, "--target", target, "--dry-run", "--json").json()
    assert facts["compiler"] == TARGETS[target].compilers[0]
    assert facts["files"].keys() == {"chunk", "decode"}
    assert facts["estimate"]["weights"] > 0
    if target not in ("rtx-30", "rtx-40", "rtx-50", "cpu"):
        assert TARGETS[target].device in facts["refusal"]
    text = invoke("build", bundle, "--target", target, "--dry-run").out
    assert facts["where"] in text
    assert contents(bundle) == before


def test_the_estimate(bundle: Path) -> None:
    """The formula of docs/engines.md, from the files alone."""
    mib, read = 1 << 20, read_bundle(bundle)
    plan = make_plan(read, Request("orin-nano", workspace_limit=100))
    graphs = [onnx.load(str(path)) for path in read.graph_paths().values()]
    weights = [sum(onnx.numpy_helper.to_array(t).nbytes for t in g.graph.initializer) for g in graphs]
    sizes = {name: value.nbytes for name, value in read.initial_state().items()}
    state = sum(size if name.endswith(".memory") else 2 * size for name, size in sizes.items())
    got = plan.estimate
    assert (got.weights, got.state, got.workspace) == (sum(weights), state, 100 * mib)
    assert got.run == sum(weights) + state + got.activations + 512 * mib + 1024 * mib
    assert got.build > 3 * max(weights) + state + (100 + 512 + 256 + 1024) * mib
    outputs = [sum(4 * int(np.prod([d.dim_value for d in v.type.tensor_type.shape.dim])) for v in g.graph.output)
               for g in graphs]  # fmt: skip
    assert got.activations >= sum(outputs)
    half = make_plan(read, Request("orin-nano", "fp16", workspace_limit=100)).estimate
    assert 0.5 * got.weights <= half.weights < 0.75 * got.weights


def test_lines_of_trtexec(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = invoke(
        "build", bundle, "--target", "orin-agx", "--precision", "fp16", "--alias", "declared", "--embed-plugin",
        "--timing-cache", "timings", "--workspace-limit", 512, "--emit-trtexec", "-o", folder,
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 2
    for line, graph in zip(lines, ("chunk", "decode"), strict=True):
        words = shlex.split(line)
        name = f"orin-agx-fp16.{graph}"
        assert words[:3] == ["trtexec", f"--onnx={name}.onnx", f"--saveEngine={name}.engine"]
        library = "libtitans_tensorrt_plugin_10.so"
        for option in (
            f"--dynamicPlugins={library}", f"--setPluginsToSerialize={library}", "--stronglyTyped", "--noTF32",
            "--memPoolSize=workspace:512M", "--timingCacheFile=timings", "--preview=+aliasedPluginIO1003",
        ):  # fmt: skip
            assert option in words
        model = onnx.load(str(folder / f"{name}.onnx"))
        memories = [node for node in model.graph.node if node.op_type == "NeuralMemory"]
        assert memories
        assert not model.functions
    assert subprocess.run(["sh", "-n", str(folder / "build.sh")]).returncode == 0
    assert lines[1] in (folder / "build.sh").read_text()
    again = ("build", bundle, "--target", "orin-agx", "--emit-trtexec", "-o", folder)
    invoke(*again).check_failure(1, "--overwrite")
    assert invoke(*again, "--overwrite").code == 0
    assert not (folder / "orin-agx-fp16.decode.onnx").exists()


def test_lines_alone_write_nothing(bundle: Path) -> None:
    before = contents(bundle)
    result = invoke("build", bundle, "--target", "h100", "--emit-trtexec", "--profile", "tokens=1x1:2x1:4x1", "--json")
    (first, _) = result.json()["lines"]
    assert "--minShapes=tokens:1x1 --optShapes=tokens:2x1 --maxShapes=tokens:4x1" in first
    assert "--preview" not in first
    assert contents(bundle) == before


@pytest.mark.slow
def test_several_engines_in_one_bundle(bundle: Path, rtx: None) -> None:
    before = contents(bundle)
    for args in (("rtx-40", "--precision", "fp16"), ("rtx-30",), ("cpu",)):
        result = invoke("build", bundle, "--target", *args, "--json")
        assert result.code == 0, result.err
        assert result.json()["engine"]["target"] == args[0]
    (bundle / "note.txt").write_text("mine")
    names = [engine.name for engine in read_bundle(bundle).manifest.engines]
    assert names == ["rtx-40-fp16", "rtx-30-fp32", "cpu-fp32"]
    others = {name: raw for name, raw in contents(bundle).items() if not name.startswith("rtx-40")}
    invoke("build", bundle, "--target", "rtx-40", "--precision", "fp16").check_failure(2, "--overwrite")
    again = ("build", bundle, "--target", "rtx-40", "--precision", "fp16", "--graph", "decode", "--overwrite")
    result = invoke(*again)
    assert result.code == 0, result.err
    after = contents(bundle)
    assert {name: raw for name, raw in after.items() if not name.startswith("rtx-40")}.items() >= {
        name: raw for name, raw in others.items() if name != "manifest.json"
    }.items()
    assert not (bundle / "rtx-40-fp16.chunk.engine").exists()
    assert before.items() - {("manifest.json", before["manifest.json"])} <= after.items()
    engines = read_bundle(bundle).manifest.raw["engines"]
    assert sorted(engine["name"] for engine in engines) == sorted(names)
    facts = invoke("inspect", bundle, "--json").json()
    assert facts["engines"] == engines
    assert "rtx-40-fp16" in invoke("inspect", bundle).out
    assert {"backend": "tensorrt_rtx", "device": "cuda sm_89"} in facts["targets"]
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_names_of_others_are_not_taken(bundle: Path) -> None:
    (bundle / "mine.decode.onnx").touch()
    invoke("build", bundle, "--target", "cpu", "--name", "mine").check_failure(2, "mine.decode.onnx", "--name")


def test_a_bundle_that_changes_meanwhile(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = building._COMPILERS["onnxruntime"]

    def meddle(*args: Any) -> Any:
        manifest = json.loads((bundle / "manifest.json").read_text())
        other = onnx.load(str(bundle / "decode.onnx"), load_external_data=False)
        other.doc_string += "another"
        (bundle / "decode.onnx").write_bytes(other.SerializeToString())
        manifest["files"]["decode.onnx"] = building.file_record(bundle / "decode.onnx").to_json()
        done = original(*args) if args[1].name == "chunk" else {}
        args[5].touch()
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        return done

    monkeypatch.setitem(building._COMPILERS, "onnxruntime", meddle)
    with pytest.raises(BundleError, match=r"decode\.onnx changed during the build"):
        building.build_engine(bundle, Request("cpu"))


STOP = """
import os, signal, sys
from pathlib import Path
from titans_export.engines import build
original, name = build._take, sys.argv[2]
def take(path, to):
    original(path, to)
    if path.name == "weights.safetensors":
        os.kill(os.getpid(), getattr(signal, name))
build._take = take
from titans_export.cli.__main__ import run
sys.argv = ["titans-export", "build", sys.argv[1], "--target", "cpu"]
run()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_kill_while_writing_leaves_the_old_bundle(bundle: Path, name: str) -> None:
    before = contents(bundle)
    done = subprocess.run(
        [sys.executable, "-c", STOP, str(bundle), name], env=environment(), capture_output=True, timeout=120
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if name == "SIGKILL" else 1), done.stderr
    assert contents(bundle) == before
    read_bundle(bundle)
    if name != "SIGKILL":
        assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    result = invoke("build", bundle, "--target", "cpu")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_kill_while_building(bundle: Path, rtx: None) -> None:
    before = contents(bundle)
    child = subprocess.Popen(
        command("build", bundle, "--target", "rtx-40"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert child.stderr
    assert "building" in child.stderr.readline()
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert "[interrupted]" in child.stderr.read()
    assert child.wait(60) == 1
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ({}, "engines: expected an array"),
        ([1], "engines[0]: expected an object"),
        ([{"name": "a"}], "missing field engines[0].target"),
    ],
)
def test_damaged_engines(bundle: Path, engines: Any, words: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "engines": engines}))
    invoke("inspect", bundle).check_failure(1, words)


def test_engines_whose_files_are_not_listed(bundle: Path) -> None:
    assert invoke("build", bundle, "--target", "cpu").code == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    for change, words in (
        (lambda engine: engine["graphs"][0].update(file="other.onnx"), "other.onnx"),
        (lambda engine: engine.update(graphs=[{}]), "missing field engines[0].graphs[0].graph"),
    ):
        damaged = json.loads(json.dumps(manifest))
        change(damaged["engines"][0])
        (bundle / "manifest.json").write_text(json.dumps(damaged))
        invoke("inspect", bundle).check_failure(1, words)
    damaged = {**manifest, "engines": manifest["engines"] * 2}
    (bundle / "manifest.json").write_text(json.dumps(damaged))
    invoke("inspect", bundle).check_failure(1, "engines: two are named")


def test_into_another_bundle(bundle: Path, tmp_path: Path) -> None:
    before, other = contents(bundle), tmp_path / "other.titans"
    result = invoke("build", bundle, "--target", "cpu", "-o", other, "--json")
    assert result.code == 0, result.err
    assert contents(bundle) == before
    assert all((other / name).stat().st_nlink == 1 for name in before), "ONNX takes no weights from such files"
    invoke("build", bundle, "--target", "cpu", "-o", other).check_failure(1, "--overwrite")
    assert invoke("build", bundle, "--target", "cpu", "-o", other, "--overwrite").code == 0
    shutil.rmtree(bundle)
    assert invoke("inspect", other).code == 0
