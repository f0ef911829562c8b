"""Engines of a bundle: which one a session takes, what it says of that, and what it refuses. On the CPU and on machines
without a GPU; what needs a device is tested on one made for tests, tests/cpp/tensorrt_test.cpp."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from synthetic import write_manifest

import titans_runtime as rt
from titans_runtime import _library

INVALID_ARGUMENT, UNSUPPORTED = 2, 4
FORM = re.compile(r"\[[^\]]+\] .+\. Fix: .+ \(TITANS-E\d{4}\)")
HERE = f"linux-{platform.machine()}"
TOKENS = [1, 5, 2, 7, 7, 0, 3]

pytestmark = pytest.mark.skipif(
    "engine" not in {name for name, _ in _library.SessionOptions._fields_}, reason="the installed runtime is older"
)


def entry(name: str, graphs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """An engine of ONNX Runtime for this machine's CPU, or what `more` makes of it."""
    return {
        "name": name,
        "target": "cpu",
        "compiler": "onnxruntime",
        "compiler_version": onnxruntime.__version__,
        "precision": "fp32",
        "device": "cpu",
        "sm": [],
        "platform": HERE,
        "cuda": None,
        "driver": None,
        "memory": "either",
        "plugin": None,
        "alias": None,
        "state_in_place": [],
        "graphs": graphs,
    } | more


CUDA = {"target": "rtx-40", "compiler": "tensorrt_rtx", "compiler_version": "1.7.1", "device": "cuda", "sm": [89],
        "cuda": "13.0", "driver": 13000, "memory": "standard-operators"}  # fmt: skip


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "engines.titans"))


def add_engines(folder: Path, *make: Callable[[str], dict[str, Any]]) -> None:
    """Engines whose files are the plain graphs with the weights inside."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"] = []
    for number, engine in enumerate(make):
        graphs = []
        for graph in manifest["graphs"]:
            file = f"engine{number}.{graph['name']}.onnx"
            onnx.save(onnx.load(folder / graph["file"]), folder / file)
            graphs.append({"graph": graph["name"], "file": file})
        manifest["engines"].append(engine("engine") | {"graphs": graphs})
    write_manifest(folder, manifest)


def refuse(folder: Path, status: int, *words: str, **options: Any) -> None:
    with pytest.raises(rt.Error) as caught:
        rt.Session(folder, **options)
    message = str(caught.value)
    assert FORM.fullmatch(message), message
    assert caught.value.status == status, message
    for word in words:
        assert word in message


def test_a_bundle_without_engines(bundle: Path) -> None:
    info = rt.Session(bundle).info
    assert info["engine"] is None
    assert info["engine_reason"] == "the bundle has no engines"
    assert info["engines_not_chosen"] == []


def test_the_engine_that_fits_is_taken(folder: Path, session: rt.Session) -> None:
    add_engines(folder, lambda _: entry("other", [], **CUDA), lambda _: entry("here", []))
    # An engine's own files are read, the plain graphs' are not.
    for graph in ("decode", "chunk", "prefill"):
        (folder / f"{graph}.onnx").unlink(missing_ok=True)
    chosen = rt.Session(folder)
    assert chosen.info["engine"] == "here"
    assert onnxruntime.__version__ in chosen.info["engine_reason"]
    [other] = chosen.info["engines_not_chosen"]
    assert other["name"] == "other"
    assert "made for cuda" in other["reason"]
    logits = chosen.stream().feed(TOKENS, outputs="all")
    np.testing.assert_allclose(logits, session.stream().feed(TOKENS, outputs="all"), rtol=0, atol=1e-5)


def test_by_name(folder: Path) -> None:
    add_engines(folder, lambda _: entry("first", []), lambda _: entry("second", []))
    assert rt.Session(folder).info["engine"] == "first"
    assert rt.Session(folder, engine="second").info["engine"] == "second"
    plain = rt.Session(folder, engine="none").info
    assert plain["engine"] is None
    assert plain["engine_reason"] == "the plain graphs were asked for"
    refuse(folder, INVALID_ARGUMENT, "first, second", "third", engine="third")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"platform": "linux-other"}, ["linux-other", HERE, "titans-export build"]),
        ({"compiler_version": "999.0.0"}, ["onnxruntime 999.0", onnxruntime.__version__, "--target cpu"]),
        (CUDA, ["made for cuda", "got cpu", "open the session on cuda"]),
        ({"compiler": "other"}, ["library of other", "no backend other"]),
    ],
    ids=["platform", "version", "device", "compiler"],
)
def test_a_mismatch(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    add_engines(folder, lambda _: entry("wrong", [], **change))
    refuse(folder, UNSUPPORTED, "wrong", *words, engine="wrong")
    # Nobody insists: on a CPU the plain graphs run, and the session says why.
    info = rt.Session(folder).info
    assert info["engine"] is None
    assert info["engine_reason"] == "no engine fits the device"
    assert words[0] in info["engines_not_chosen"][0]["reason"]


def test_a_damaged_engine(folder: Path) -> None:
    add_engines(folder, lambda _: entry("here", []))
    with (folder / "engine0.decode.onnx").open("ab") as file:
        file.write(b"more")
    refuse(folder, 1, "engine0.decode.onnx", "bytes")
    assert rt.Session(folder, engine="none").info["engine"] is None


def test_an_engine_of_onnxruntime_points_into_the_weights(folder: Path) -> None:
    add_engines(folder, lambda _: entry("here", []))
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    refuse(folder, 1, "weights.safetensors", "hash")


class TestWithoutADriver:
    @pytest.fixture(autouse=True)
    def no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TITANS_CUDA_DRIVER", "/nowhere/libcuda.so.1")

    def test_a_session_on_cuda(self, folder: Path) -> None:
        add_engines(folder, lambda _: entry("rtx", [], **CUDA))
        for device in ("cuda", "cuda:1"):
            refuse(folder, UNSUPPORTED, "open the session on cpu", device=device)

    def test_the_command(self, folder: Path) -> None:
        pytest.importorskip("titans_export")
        add_engines(folder, lambda _: entry("rtx", [], **CUDA))
        result = subprocess.run(
            [sys.executable, "-m", "titans_export.cli", "run", folder, "--device", "cuda", "--prompt", "To be"],
            capture_output=True, text=True, env=os.environ | {"TITANS_CUDA_DRIVER": "/nowhere/libcuda.so.1"},
        )  # fmt: skip
        assert result.returncode == 4, result.stderr
        assert FORM.search(result.stderr), result.stderr
        assert result.stdout == ""


def test_no_such_device(bundle: Path) -> None:
    refuse(bundle, UNSUPPORTED, "cpu, cuda", "tpu", device="tpu")


def test_libraries_in_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_rtx_libs"
    package.mkdir()
    (package / "__init__.py").touch()
    library = package / "libtensorrt_rtx.so.1"
    library.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx_libs", raising=False)  # where it is installed and has been imported
    assert f"tensorrt_rtx={library}" in _library.vendor_libraries().splitlines()
    library.unlink()
    assert f"tensorrt_rtx={library}" not in _library.vendor_libraries().splitlines()
