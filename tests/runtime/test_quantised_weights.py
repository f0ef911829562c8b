"""Quantised weights in the runtime: handed over from the mapping, checked before that, the same in every cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import xxhash
from cli_tools import invoke
from quantised_tools import RECIPES, with_memory

import titans_runtime
from titans_export.bundle import read_bundle
from titans_export.manifest import GraphEntry
from titans_export.running import BundleRunner, memory_kernel, open_session

pytest_plugins = ["quantised_fixtures"]
Make = Callable[[Any], Path]
TOKENS = (np.arange(90, dtype=np.int32) * 37) % 96


def feed(session: titans_runtime.Session, cuts: list[int]) -> np.ndarray[Any, Any]:
    stream = session.stream()
    parts = np.split(TOKENS, np.cumsum(cuts))
    return np.concatenate([stream.feed(part) for part in parts if len(part)])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_format_runs_and_no_cut_changes_it(quantised_bundle: Make, recipe: str) -> None:
    bundle = read_bundle(quantised_bundle(RECIPES[recipe]))
    with titans_runtime.Session(bundle.path) as session:
        whole = feed(session, [])
        assert np.isfinite(whole).all() and float(whole.std()) > 0.01
        scale = float(np.abs(whole).max())
        for cuts in ([1] * 20, [3, 16, 1, 40], [24, 8]):
            # Where a graph's float differs in the last bit, a rounding to int8 may go the other way. ONNX Runtime
            # rounds the inputs of int4 matmuls too.
            rounds = "8" in recipe or recipe == "int4"
            np.testing.assert_allclose(feed(session, cuts), whole, atol=2e-2 * scale if rounds else 1e-3 * scale)
    golden = bundle.golden()
    tokens, logits = golden.inputs, golden.values
    with titans_runtime.Session(bundle.path) as session:
        outputs = session.stream().feed(tokens)
        assert float(np.abs(outputs - logits).max()) <= bundle.tolerance


def test_no_cut_changes_int4_without_rounding_inputs(quantised_bundle: Make) -> None:
    bundle = read_bundle(quantised_bundle(RECIPES["int4"]))
    config = {"session.qdq_matmulnbits_accuracy_level": "1"}  # float32 inputs

    def open_graph(graph: GraphEntry) -> onnxruntime.InferenceSession:
        return open_session(bundle.path / graph.file, kernel=memory_kernel(), config=config)

    runner = BundleRunner(bundle, open_graph)

    def outputs(cuts: list[int]) -> np.ndarray[Any, Any]:
        rows, state, at = [], bundle.initial_state(), 0
        for part in np.split(TOKENS, np.cumsum(cuts)):
            for call in runner.stream(part, state, at):
                rows.append(call.values[runner.output][0])
                state = call.state
            at += len(part)
        return np.concatenate(rows)

    whole = outputs([])
    for cuts in ([1] * 20, [3, 16, 1, 40], [24, 8]):
        np.testing.assert_allclose(outputs(cuts), whole, atol=1e-5 * float(np.abs(whole).max()))


@pytest.mark.parametrize(("dtype", "rounding"), [("int8", "stochastic"), ("bfloat16", "error_feedback")])
def test_memories_in_few_bits(quantised_bundle: Make, dtype: str, rounding: str) -> None:
    bundle = read_bundle(quantised_bundle(with_memory("float16", dtype, rounding)))
    [entry] = [entry for entry in bundle.manifest.state if entry.role == "memory"]
    assert {field.dtype for field in entry.layout if field.name in ("W0", "S0")} == {dtype}
    assert bundle.initial_state()[entry.name].shape == entry.shape
    with titans_runtime.Session(bundle.path) as session:
        whole = feed(session, [])
        for cuts in ([1] * 20, [3, 16, 1, 40]):
            np.testing.assert_allclose(feed(session, cuts), whole, atol=1e-2 * float(np.abs(whole).max()))


def test_a_memory_in_few_bits_reads_as_float32(quantised_bundle: Make) -> None:
    plain = read_bundle(quantised_bundle(with_memory("float16", "float32", "nearest")))
    stored = read_bundle(quantised_bundle(with_memory("float16", "int8", "stochastic")))
    with titans_runtime.Session(plain.path) as right, titans_runtime.Session(stored.path) as session:
        memories = []
        for each in (right, session):
            stream = each.stream()
            stream.feed(TOKENS)
            memories.append(stream.memory())
    fields = [name for name in memories[0] if name.rpartition(".")[2] in ("W0", "S0")]
    assert len(fields) == 2
    for name in fields:
        wanted, got = memories[0][name], memories[1][name]
        assert got.shape == wanted.shape and got.dtype == np.float32 and np.abs(wanted).max() > 0
        # Steps of int8 are a 127th of a block's largest; chunk_updates add up a few of them.
        np.testing.assert_allclose(got, wanted, atol=0.1 * float(np.abs(wanted).max()))
        assert not np.array_equal(got, wanted)


def test_a_memory_in_few_bits_needs_the_kernel(quantised_bundle: Make) -> None:
    path = quantised_bundle(with_memory("float16", "int8", "stochastic"))
    with pytest.raises(
        titans_runtime.Error, match=r'memory dtype int8, which needs our memory kernel, got memory_kernel="off"'
    ):
        titans_runtime.Session(path, memory_kernel="off")
    result = invoke("verify", path, "--memory-kernel", "off")
    assert result.code == 4, result.err
    assert "our memory kernel" in result.err


def damaged(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose weights' header is changed, with the size and the hashes that it then has."""
    shutil.copytree(source, target)
    file = target / "weights.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    manifest = json.loads((target / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][file.name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def name_of(header: dict[str, Any], ending: str) -> str:
    return next(name for name in sorted(header) if name.endswith(ending))


def test_int4_of_too_few_bytes(quantised_bundle: Make, tmp_path: Path) -> None:
    def shorten(header: dict[str, Any]) -> None:
        entry = header[name_of(header, ".int4")]
        end = entry["data_offsets"][1]
        entry["data_offsets"][1] -= 64
        entry["shape"][0] -= 64
        header["rest"] = {"dtype": "U8", "shape": [64], "data_offsets": [end - 64, end]}  # a file has no gaps

    path = damaged(quantised_bundle(RECIPES["int4"]), tmp_path / "b", shorten)
    with pytest.raises(titans_runtime.Error, match=r"\.int4: expected int4 .*, got uint8 \["):
        titans_runtime.Session(path)


@pytest.mark.parametrize(("recipe", "ending", "dtype"), [("int8", ".int8", "U8"), ("fp8", ".fp8", "I8")])
def test_numbers_of_another_type(quantised_bundle: Make, recipe: str, ending: str, dtype: str, tmp_path: Path) -> None:
    def retype(header: dict[str, Any]) -> None:
        header[name_of(header, ending)]["dtype"] = dtype

    path = damaged(quantised_bundle(RECIPES[recipe]), tmp_path / "b", retype)
    with pytest.raises(titans_runtime.Error, match=r"as in prefill\.onnx, got"):
        titans_runtime.Session(path)


def test_a_type_that_the_runtime_does_not_know(quantised_bundle: Make, tmp_path: Path) -> None:
    def retype(header: dict[str, Any]) -> None:
        header[name_of(header, ".fp8")]["dtype"] = "F8_E5M2"

    path = damaged(quantised_bundle(RECIPES["fp8"]), tmp_path / "b", retype)
    with pytest.raises(titans_runtime.Error, match=r"expected a dtype that this runtime has, got \"F8_E5M2\""):
        titans_runtime.Session(path)


def test_float8_of_the_wrong_size(quantised_bundle: Make, tmp_path: Path) -> None:
    def reshape(header: dict[str, Any]) -> None:
        header[name_of(header, ".fp8")]["shape"][0] *= 2

    path = damaged(quantised_bundle(RECIPES["fp8"]), tmp_path / "b", reshape)
    with pytest.raises(titans_runtime.Error, match=r"the size of float8_e4m3fn"):
        titans_runtime.Session(path)


def test_inspect_shows_the_quantisation(quantised_bundle: Make) -> None:
    from click.testing import CliRunner

    from titans_export.cli import main

    path = quantised_bundle(RECIPES["int8"])
    text = CliRunner().invoke(main, ["inspect", str(path)])
    assert text.exit_code == 0 and "quantised with recipe int8" in text.output and "in int8" in text.output
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).output)
    assert facts["quantization"]["formats"]["int8"] >= 5
