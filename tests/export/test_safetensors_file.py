"""Every tensor that the writer writes is where the readers want it, whatever its size."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import model_of, session, value
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from quantised_tools import RECIPES, observe_noise
from safetensors import safe_open
from safetensors.numpy import load_file
from shared_bundles import made_once
from synthetic import Weights, write_bundle, write_manifest

from titans_calibration.graphs import quantise_graphs
from titans_calibration.options import QuantizeOptions
from titans_calibration.recipe import MemoryRecipe
from titans_calibration.source import open_source
from titans_calibration.writing import write_quantised
from titans_export import safetensors_file
from titans_export.bundle import file_record, read_bundle
from titans_export.checkpoints.titans import save
from titans_export.dtypes import DTYPES
from titans_export.exporting import export_checkpoint
from titans_export.model import MemoryConfig, ModelConfig, Titans
from titans_export.onnx.files import load_structure
from titans_export.onnx.mapped import array_of, is_mapped, load_mapped, point_to, spilling, write_graph
from titans_export.onnx.weights import share_weights
from titans_export.running import BundleRunner
from titans_export.safetensors_file import ALIGNMENT, Raw, write_safetensors

BY_NAME = {dtype.safetensors: dtype for dtype in DTYPES.values()}
GPT2 = 50_257
_NUMPY = [dtype for dtype in DTYPES.values() if dtype.name not in ("bfloat16", "float8_e4m3fn")]


def drawn(seed: int) -> dict[str, NDArray[Any] | Raw]:
    """Tensors of all dtypes, with sizes that are mostly odd."""
    draw = np.random.default_rng(seed)
    found: dict[str, NDArray[Any] | Raw] = {}
    for number in range(40):
        shape = tuple(int(draw.choice([0, 1, 3, 7, 16, 33, 64, 279])) for _ in range(draw.integers(3)))
        dtype = _NUMPY[int(draw.integers(len(_NUMPY)))]
        bits = draw.integers(0, 2, (*shape, dtype.bytes), np.uint8)
        found[f"{number}.{dtype.name}"] = bits.view(dtype.name)[..., 0]
    for number, name in enumerate(("BF16", "F8_E4M3", "U8")):
        size = int(draw.integers(1, 300))
        found[f"raw.{number}"] = Raw(name, (size,), draw.bytes(size * BY_NAME[name].bytes))
    found["large"] = np.arange(5_000_001, dtype=np.float32)  # several blocks
    found["strided"] = np.arange(2 * 279, dtype=np.int64).reshape(2, 279).T
    return found


def check_file(path: Path) -> dict[str, tuple[int, int]]:
    """Checks the rules of docs/bundle.md. Returns offset and bytes of each tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start, end = 8 + length, 0
    assert start % ALIGNMENT == 0
    places = {}
    for name, entry in sorted(json.loads(content[8:start]).items(), key=lambda item: item[1]["data_offsets"]):
        begin, after = entry["data_offsets"]
        assert begin == end, "the format permits no gaps"
        size = after - begin
        assert (start + begin) % (ALIGNMENT if size % ALIGNMENT == 0 else BY_NAME[entry["dtype"]].bytes) == 0, name
        places[name], end = (start + begin, size), after
    assert start + end == len(content)
    return places


@pytest.mark.parametrize("seed", range(8))
def test_odd_sizes(seed: int, tmp_path: Path) -> None:
    titans_runtime = pytest.importorskip("titans_runtime", reason="the runtime is not built", exc_type=ImportError)
    tensors = drawn(seed)
    bundle = write_bundle(tmp_path / "b.titans", Weights.random())
    state = bundle / "state.safetensors"
    offsets = write_safetensors(state, {**tensors, **load_file(state)})
    places = check_file(state)
    content = state.read_bytes()
    for name, tensor in tensors.items():
        at, size = places[name]
        assert offsets[name] == at
        assert content[at : at + size] == (tensor.data if isinstance(tensor, Raw) else tensor.tobytes())
    with safe_open(state, "np") as file:  # the format's own reader
        for name, tensor in tensors.items():
            if not isinstance(tensor, Raw):
                np.testing.assert_array_equal(file.get_tensor(name), tensor)
    write_manifest(bundle, json.loads((bundle / "manifest.json").read_text()))
    titans_runtime.Session(bundle).close()  # the runtime reads every tensor's entry


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("table", "rows", "columns"), [(GPT2, 3, 1), (2049, 33, 65), (1031, 64, 257), (97, 96, 1001)])
def test_odd_weights_of_every_recipe(table: int, rows: int, columns: int, recipe: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(rows)
    weights: dict[str, NDArray[Any]] = {
        "model.embedding": draw.standard_normal((table, rows)).astype(np.float32),
        "model.head": draw.standard_normal((rows, columns)).astype(np.float32),
        "model.bias": draw.standard_normal(columns).astype(np.float32),
        "order": draw.permutation(columns).astype(np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["model.embedding", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "model.head"], ["matmul"]),
        helper.make_node("Add", ["matmul", "model.bias"], ["sum"]),
        helper.make_node("Gather", ["sum", "order"], ["y"], axis=2),
    ]
    tensors = tuple(numpy_helper.from_array(array, name) for name, array in weights.items())
    inputs, outputs = [value("ids", (1, 5), TensorProto.INT64)], [value("y", (1, 5, columns))]
    models = {"g": model_of(nodes, inputs, outputs, tensors)}
    models["g"].graph.value_info.extend([value("rows", (1, 5, rows)), value("matmul", (1, 5, columns))])
    chosen = RECIPES[recipe]
    found = quantise_graphs(models, chosen, observe_noise(models) if chosen.needs_data else None).models["g"]
    ids = {"ids": draw.integers(0, table, (1, 5))}
    before = session(found).run(None, ids)[0]
    share_weights({"g": found}, tmp_path / "weights.safetensors")
    assert check_file(tmp_path / "weights.safetensors")
    (tmp_path / "g.onnx").write_bytes(found.SerializeToString())
    np.testing.assert_array_equal(session(tmp_path / "g.onnx").run(None, ids)[0], before)

    source = {"g": load_mapped(write_graph(models["g"], tmp_path / "float32.onnx"))}
    observed = observe_noise(source) if chosen.needs_data else None
    with spilling(tmp_path) as spill:
        found = quantise_graphs(source, chosen, observed, spill=spill).models["g"]
        assert all(is_mapped(t) or len(t.raw_data) < 1024 for t in found.graph.initializer)
        share_weights({"g": found}, tmp_path / "mapped.safetensors")
    assert (tmp_path / "mapped.safetensors").read_bytes() == (tmp_path / "weights.safetensors").read_bytes()


ZEROS = memoryview(bytes(1 << 20))
FAR = (4 << 30) + len(ZEROS)


class SparseFile(io.FileIO):
    """A file in which ZEROS become holes."""

    def write(self, block: Any, /) -> int:
        if block is ZEROS:
            self.seek(len(block), os.SEEK_CUR)
            return len(block)
        return super().write(block)


RUN = """
import re, sys
import numpy as np
import titans_runtime
with titans_runtime.Session(sys.argv[1]) as session:
    np.save(sys.argv[2], session.stream().feed(np.load(sys.argv[3])))
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10)
"""


@pytest.mark.long  # hashes 4 GB three times
def test_weights_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("titans_runtime", reason="the runtime is not built", exc_type=ImportError)
    folder = write_bundle(tmp_path / "b.titans", Weights.random())
    weights = folder / "weights.safetensors"
    tensors = load_file(weights)
    filler = Raw("U8", (FAR,), np.broadcast_to(np.uint8(0), FAR))
    blocks_of = safetensors_file.blocks_of
    zeros = itertools.repeat(ZEROS, FAR // len(ZEROS))
    monkeypatch.setattr(safetensors_file, "blocks_of", lambda value: zeros if value is filler else blocks_of(value))
    monkeypatch.setattr(Path, "open", lambda path, mode: SparseFile(path, mode))
    offsets = write_safetensors(weights, {**tensors, "filler": filler})
    monkeypatch.undo()
    assert weights.stat().st_size > FAR > weights.stat().st_blocks * 512
    assert offsets["filler"] < 1 << 10 and all(offsets[name] > FAR for name in tensors)

    manifest = json.loads((folder / "manifest.json").read_text())
    for graph in manifest["graphs"]:
        model = load_structure(folder / graph["file"])
        for tensor in model.graph.initializer:
            if tensor.name in tensors:
                point_to(tensor, weights.name, offsets[tensor.name], tensors[tensor.name].nbytes)
        (folder / graph["file"]).write_bytes(model.SerializeToString())
        for tensor in load_mapped(folder / graph["file"]).graph.initializer:
            if tensor.name in tensors:
                np.testing.assert_array_equal(array_of(tensor), tensors[tensor.name])
    for name in manifest["files"]:
        manifest["files"][name] = file_record(folder / name).to_json()
    (folder / "manifest.json").write_text(json.dumps(manifest))

    inputs, outputs = load_file(folder / "golden.safetensors").values()
    if outputs.ndim == 1:
        inputs, outputs = outputs, inputs
    np.save(tmp_path / "inputs.npy", inputs)
    command = [sys.executable, "-c", RUN, folder, tmp_path / "outputs.npy", tmp_path / "inputs.npy"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), outputs, atol=1e-4)
    assert int(run.stdout) < 300 << 20, "the file is hashed in blocks, not kept in memory"
    calls = list(BundleRunner(read_bundle(folder)).stream(inputs))  # ONNX Runtime reads the file itself
    np.testing.assert_allclose(np.concatenate([call.values["logits"][0] for call in calls]), outputs, atol=1e-4)


def _odd_model(path: Path, folder: Path) -> None:
    torch.manual_seed(3)
    model = Titans(ModelConfig("mag", 1031, 66, 1, 67, MemoryConfig(3, 21, 8), attention_heads=3, window=16))
    save(model, folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", path, chunks_per_call=1, positions=40)


@pytest.mark.long  # an export of its own
@pytest.mark.parametrize(
    ("recipe", "memory"),
    [
        ("int8", "int8"),
        ("int8-channel", "float32"),
        ("int4", "fp8"),
        ("fp8", "float16"),
        ("float16", "bfloat16"),
        ("bfloat16", "int8"),
    ],
)
def test_odd_bundles_of_every_memory_dtype(recipe: str, memory: str, tmp_path: Path) -> None:
    """The runtime runs each over the golden tokens before it is written."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built", exc_type=ImportError)
    bundle = read_bundle(made_once("odd", partial(_odd_model, folder=tmp_path)))
    models = open_source(bundle).models
    chosen = RECIPES[recipe]
    if memory != "float32":
        chosen = dataclasses.replace(chosen, memory=MemoryRecipe(memory))
    observed = observe_noise(models) if chosen.needs_data else None
    options = QuantizeOptions(bundle.path, tmp_path / "q.titans", chosen)
    written = write_quantised(bundle, quantise_graphs(models, chosen, observed), options)
    assert np.isfinite(written.max_abs_error)
    for file in ("weights.safetensors", "state.safetensors"):
        check_file(tmp_path / "q.titans" / file)
    read_bundle(tmp_path / "q.titans")
