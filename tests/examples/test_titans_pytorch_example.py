"""The example of a titans-pytorch model: its checkpoint through the command line, and its scripts.

In float32 two right computations of this model drift apart, the library's own from its float64 too: every update is
made orthogonal, which gives the rounding of small gradients full size. Differences grow about fourfold in 256 tokens,
and past 2,000 tokens single logits have nothing in common. So logits are held to the library's float64 by the rule that
exports have, four times what the library's own float32 is off, stretch by stretch; and bits per byte are compared
closely where streams are still together, and as a mean of what then is noise.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cli_tools import invoke
from numpy.typing import NDArray
from safetensors.torch import load_file
from shared_bundles import made_once

from titans_export.checkpoints.titans_pytorch import read
from titans_export.manifest import read_manifest
from titans_export.reference import FLOAT32_SHARE

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: make setup")
rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "titans_pytorch"
CHECKPOINT = ROOT / "examples" / "checkpoints" / "titans-pytorch-bytes"
FORMAT = ("--format", "titans-pytorch", "--config", CHECKPOINT / "model.json")
TEXT = Path(pydoc_data.topics.__file__)
BYTES, TOGETHER, STRETCH = 4096, 1024, 256

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


class Logits(NamedTuple):
    """After each byte of the text, (BYTES, 256): the runtime's, the library's in float32 and in float64."""

    runtime: NDArray[np.float64]
    float32: NDArray[np.float64]
    float64: NDArray[np.float64]


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bundle() -> Path:
    def export(path: Path) -> None:
        result = invoke(
            "export", CHECKPOINT / "model.safetensors", *FORMAT, "-o", path, "--chunks-per-call", 1, "--json"
        )
        assert result.code == 0, result.err
        assert result.json()["library_error"] < 1e-4

    return made_once("bytes", export)


@pytest.fixture(scope="module")
def logits(bundle: Path) -> Logits:
    text = TEXT.read_bytes()[:BYTES]
    with rt.Session(bundle) as session:
        runtime = session.stream().feed(text).astype(np.float64)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    model = library()
    with torch.no_grad():
        float32 = model(tokens, disable_flex_attn=True)[0].double().numpy()
        float64 = model.double()(tokens, disable_flex_attn=True)[0].numpy()
    return Logits(runtime, float32, float64)


def library() -> Any:
    """The checkpoint in the library: the constructor's arguments from its file, the weights strictly."""
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

    arguments = json.loads((CHECKPOINT / "model.json").read_text())
    network = {key: value for key, value in arguments.pop("neural_memory_model").items() if key != "type"}
    arguments = {key: value for key, value in arguments.items() if key not in ("class", "version")}
    arguments["neural_memory_layers"] = tuple(arguments["neural_memory_layers"])
    model = MemoryAsContextTransformer(neural_memory_model=MemoryMLP(**network), **arguments)
    # Assigned: the library's initial memories are views of one head's.
    model.load_state_dict(load_file(CHECKPOINT / "model.safetensors"), strict=True, assign=True)
    return model.eval()


def bits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each byte but the first, given all before it."""
    following = torch.frombuffer(bytearray(TEXT.read_bytes()[:BYTES]), dtype=torch.uint8).long()[1:, None]
    logprobs = torch.from_numpy(logits[:-1]).log_softmax(-1).gather(1, following)[:, 0]
    return -logprobs.numpy() / np.log(2)


def test_the_bundle_is_verified(bundle: Path) -> None:
    result = invoke("verify", bundle, "--json")
    assert result.code == 0, result.err
    assert result.json()["passed"] is True


def test_logits_are_the_librarys(bundle: Path, logits: Logits) -> None:
    tolerance = json.loads((bundle / "manifest.json").read_text())["golden"]["tolerance"]
    assert np.abs(logits.runtime - logits.float32)[:600].max() <= tolerance
    # As long as the library's own float32 is about half of that from float64.
    assert np.abs(logits.runtime - logits.float64)[: 2 * STRETCH].max() <= 1e-4
    # Later on float32 streams have nothing in common, the library's own included.
    for start in range(0, TOGETHER, STRETCH):
        at = slice(start, start + STRETCH)
        own = np.abs(logits.float32 - logits.float64)[at].max()
        assert np.abs(logits.runtime - logits.float64)[at].max() <= max(1e-4, own / FLOAT32_SHARE), start


def test_bits_per_byte_are_the_librarys(bundle: Path, logits: Logits) -> None:
    of = Logits(*map(bits, logits))
    assert abs(of.runtime[:TOGETHER].mean() - of.float32[:TOGETHER].mean()) <= 1e-4
    assert abs(of.runtime[:TOGETHER].mean() - of.float64[:TOGETHER].mean()) <= 1e-4
    for other in (of.float32, of.float64):
        assert abs(of.runtime.mean() - other.mean()) <= 0.01
    # What is scored is what logits say.
    with rt.Session(bundle) as session:
        scored = session.stream().score(TEXT.read_bytes()[:BYTES]).astype(np.float64)
    assert np.abs(-scored[1:] / np.log(2) - of.runtime)[:TOGETHER].max() <= 1e-3


def test_evaluating(bundle: Path) -> None:
    options = ("--whole-file", "--bytes", 3000, "--library-bytes", 512, "--bundle", bundle, "--json")
    found = json.loads(script("evaluate.py", CHECKPOINT, "--data", TEXT, *options))
    assert (found["bytes"], found["first_bytes"]) == (3000, 512)
    runtime, float32, float64 = found["bits_per_byte_of_the_first"].values()
    assert abs(runtime - float64) <= 1e-4
    assert abs(float32 - float64) <= 1e-4
    with rt.Session(bundle) as session:
        scored = session.stream().score(TEXT.read_bytes()[:3000])
    assert found["bits_per_byte"] == pytest.approx(-scored.astype(np.float64).sum() / np.log(2) / 3000, abs=2e-2)


def test_training_writes_what_export_reads(tmp_path: Path) -> None:
    script("train.py", "--data", TEXT, "-o", tmp_path, "--minutes", 0.05, "--batch", 1, "--window", 32, "--threads", 1)
    source = read(tmp_path / "model.pt", str(tmp_path / "model.json"))
    assert source.kind == "transformer"
    shapes = {name: value.shape for name, value in load_file(CHECKPOINT / "model.safetensors").items()}
    assert source.tensors.keys() <= shapes.keys()
    assert all(value.shape == shapes[name] for name, value in source.tensors.items())
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] > 0 and np.isfinite(record["last_bits_per_byte"])


def test_a_stream_that_runs_away_is_kept_within_limits(bundle: Path, tmp_path: Path) -> None:
    """One byte 20,000 times between texts: limits from data hold the norms, and the text afterwards is predicted."""
    guarded, data = tmp_path / "guarded.titans", tmp_path / "text.txt"
    text = TEXT.read_bytes()
    data.write_bytes(text)
    result = invoke("guard", bundle, "--data", data, "--tokens", 16_384, "--piece", 4096, "-o", guarded)
    assert result.code == 0, result.err
    limits = read_manifest(guarded).guard
    assert limits is not None and limits.limits
    bits: dict[str, float] = {}
    for guard in ("bundle", "off"):
        with rt.Session(guarded, threads=1, guard=guard) as session:
            stream = session.stream()
            stream.feed(text[:8000], outputs="none")
            calm = stream.fork()
            stream.feed(b"a" * 20_000, outputs="none")
            if guard == "off":
                assert stream.health.divergences > 0
                continue
            report = stream.guard_report
            assert report.reason == "norm" and report.repairs == report.rollbacks > 0 and report.field is not None
            assert all(stream.peak_norms()[name] <= limit for name, limit in limits.limits.items())
            assert stream.health.divergences == 0 and stream.learning
            for name, one in (("after", stream), ("calm", calm)):
                bits[name] = -float(np.mean(one.score(text[8000:16_000]), dtype=np.float64)) / math.log(2)
    assert bits["after"] <= 1.05 * bits["calm"]
