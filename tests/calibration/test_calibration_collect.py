"""What is collected against PyTorch in float64, and collecting that was killed against one that was not."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from calibration_tools import CALL, TOKENS
from cli_tools import environment, reseal
from safetensors.numpy import load_file
from synthetic import MEMORY, Reference, Weights, write_bundle, write_manifest

from titans_calibration import instrument
from titans_calibration.collect import Collected, collect, find_groups
from titans_calibration.data import Data, read_data
from titans_calibration.instrument import open_runner
from titans_calibration.options import work_file
from titans_calibration.source import open_source
from titans_export.bundle import read_bundle
from titans_export.engines import onnxruntime as engine
from titans_export.errors import BundleError, MachineError
from titans_export.model import Titans
from titans_export.model.layers import Linear
from titans_export.safetensors_file import write_safetensors
from titans_export.schedule import calls

pytest_plugins = ["calibration_fixtures"]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(float32_bundle: Path, long_text: Path) -> Data:
    whole = read_data(read_bundle(float32_bundle), [long_text], TOKENS)
    stream = whole.streams[0]
    return Data((stream, stream[7:31]), ("a", "b"), 0)


@pytest.fixture(scope="module")
def collected(float32_bundle: Path, data: Data) -> Collected:
    return collect(open_source(read_bundle(float32_bundle)), data, gram=True)


@pytest.fixture(scope="module")
def inputs(model: Titans, data: Data) -> dict[str, npt.NDArray[np.float64]]:
    """Every input of every matmul of PyTorch in float64 over the same streams, (rows, K)."""
    double = copy.deepcopy(model).double()
    fresh = double.initial_state(1)  # before the hooks: what it multiplies is in the bundle's state, not its graphs
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in double.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.setdefault(name, []).append(given[0].flatten(0, -2))
            )
    with torch.no_grad():
        for stream in data.streams:
            double.feed(torch.from_numpy(stream)[None], fresh, 0)
    return {f"model.{name}.weight": torch.cat(rows).detach().numpy() for name, rows in seen.items()}


def test_matmuls_see_what_they_see_in_pytorch(
    collected: Collected, inputs: dict[str, npt.NDArray[np.float64]], data: Data
) -> None:
    shared = set(collected.observations)
    assert shared == set(inputs)
    assert collected.tokens == data.tokens
    for name in shared:
        seen, rows = collected.observations[name], inputs[name]
        scale = np.abs(rows).max()
        assert seen.count == len(rows), name
        np.testing.assert_allclose((seen.low, seen.high), (rows.min(), rows.max()), atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(seen.channels, np.abs(rows).max(0), atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(seen.mean_abs, np.abs(rows).mean(0), atol=1e-4 * scale, err_msg=name)
        assert seen.gram is not None
        right = rows.T @ rows
        np.testing.assert_allclose(seen.gram.matrix(), right, atol=1e-4 * np.abs(right).max(), err_msg=name)


def test_memories_are_seen_after_each_call(model: Titans, collected: Collected, data: Data) -> None:
    double = copy.deepcopy(model).double()
    facts = double.state_info()
    right: dict[str, list[float]] = {}
    with torch.no_grad():
        for stream in data.streams:
            tokens, state = torch.from_numpy(stream)[None], double.initial_state(1)
            for at in range(0, len(stream), CALL):
                _, state = double.feed(tokens[:, at : at + CALL], state, at)
                for name, fact in facts.items():
                    for field in fact.layout or ():
                        if field.name[0] in "WS":
                            values = state[name][..., field.offset : field.offset + int(np.prod(field.shape))]
                            right.setdefault(f"{name}.{field.name}", []).extend([values.min(), values.max()])
    assert set(collected.memory) == set(right)
    for name, ranges in collected.memory.items():
        low, high = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
        assert (low, high) == pytest.approx((float(min(right[name])), float(max(right[name]))), rel=1e-3, abs=1e-6)
        assert sorted(ranges) == [0, 1024]


def test_sessions_of_large_graphs_share_the_mapped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights.random()
    source = open_source(read_bundle(write_bundle(tmp_path / "b.titans", weights)))
    monkeypatch.setattr(instrument, "PACKED_BYTES", 0)
    made: list[npt.NDArray[np.float32]] = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda a: made.append(a) or make(a))
    tokens = np.arange(13, dtype=np.int32)  # runs all three graphs
    runner = open_runner(source.bundle, source.structures)
    outputs = np.concatenate([call.values["logits"][0] for call in runner.stream(tokens)])
    np.testing.assert_allclose(outputs, Reference(weights).feed(tokens), atol=1e-4)
    assert len(made) == len(weights.named()), "one value for all sessions"
    assert not any(array.flags.owndata or array.flags.writeable for array in made), "mapped, not copied"


def test_fields_are_observed_by_kind_and_not_by_name(tmp_path: Path) -> None:
    """An operator whose weights have a name that no operator of ours has, and whose counter has the name of weights."""
    weights = Weights.random(width=6)
    bundle = write_bundle(tmp_path / "foreign.titans", weights)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["state"][0]["layout"] = [
        {"name": "traces", "offset": 0, "shape": [4, 6], "kind": "weights", "written": "chunk"},
        {"name": "drive", "offset": 24, "shape": [2, 6], "kind": "surprise", "written": "chunk"},
        {"name": "W0", "offset": 36, "shape": [2], "kind": "coefficient", "written": "token"},
    ]
    write_manifest(bundle, manifest)
    streams = tuple(np.random.default_rng(seed).integers(0, 16, 21, np.int32) for seed in (1, 2))
    found = collect(open_source(read_bundle(bundle)), Data(streams, ("a", "b"), 0)).memory

    seen: list[npt.NDArray[np.float32]] = []
    for stream in streams:
        model, position = Reference(weights), 0
        for _, graph in calls(read_bundle(bundle).manifest.graphs, 0, len(stream)):
            model.feed(stream[position : position + graph.tokens])
            position += graph.tokens
            seen.append(model.memory)
    right = {"traces": np.stack(seen)[:, :4], "drive": np.stack(seen)[:, 4:]}
    assert set(found) == {f"{MEMORY}.{name}" for name in right}
    for name, values in right.items():
        assert found[f"{MEMORY}.{name}"] == {0: pytest.approx((values.min(), values.max()), rel=1e-5)}


def test_function_bodies_show_what_the_kernel_shows(
    float32_bundle: Path, data: Data, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise MachineError("E0607", "test", "no kernel", "install one")

    monkeypatch.setattr(engine, "kernel_library", missing)
    other = collect(open_source(read_bundle(float32_bundle)), data, gram=True)
    for name, seen in collected.observations.items():
        assert other.observations[name].high == pytest.approx(seen.high, rel=1e-3)
        np.testing.assert_allclose(other.observations[name].mean_abs, seen.mean_abs, rtol=1e-3, atol=1e-6)


def test_matmuls_of_one_input_are_observed_once(float32_bundle: Path) -> None:
    groups = find_groups(open_source(read_bundle(float32_bundle)).structures)
    together = [set(group.weights) for group in groups if len(group.weights) > 1]
    assert any({"model.layers.0.attention.key.weight", "model.layers.0.attention.value.weight"} <= g for g in together)


def _equal(a: Collected, b: Collected) -> None:
    assert a.memory == b.memory
    assert set(a.observations) == set(b.observations)
    for name, one in a.observations.items():
        other = b.observations[name]
        assert (one.count, one.low, one.high, one.limit) == (other.count, other.low, other.high, other.limit)
        assert one.windows == other.windows
        assert one.gram is not None and other.gram is not None
        assert [part.tobytes() for part in one.gram.parts] == [part.tobytes() for part in other.gram.parts], name
        for field in ("channels", "sum_abs", "counts"):
            x, y = getattr(one, field), getattr(other, field)
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), (name, field)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("calls", [3, 130, 136])
def test_what_was_stopped_goes_on_to_the_same_bits(
    float32_bundle: Path, data: Data, collected: Collected, tmp_path: Path, calls: int
) -> None:
    """Within the first stream, among its single tokens and within the second."""
    bundle, work = open_source(read_bundle(float32_bundle)), tmp_path / "work"
    left = calls

    def stop(tokens: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _StopError

    with pytest.raises(_StopError):
        collect(bundle, data, gram=True, work=work, save_seconds=0, progress=stop)
    done: list[int] = []
    resumed = collect(bundle, data, gram=True, work=work, save_seconds=1e9, progress=done.append)
    assert 0 < resumed.resumed_at == done[0] < data.tokens == sum(done)
    _equal(resumed, collected)


def test_other_data_and_needs_and_damage_start_anew(float32_bundle: Path, data: Data, tmp_path: Path) -> None:
    bundle, work = open_source(read_bundle(float32_bundle)), tmp_path / "work"
    short = Data((data.streams[1],), ("b",), 0)
    collect(bundle, short, work=work, save_seconds=0)
    assert collect(bundle, short, work=work).resumed_at == len(short.streams[0])
    other = Data((data.streams[1][1:],), ("b",), 0)
    assert collect(bundle, other, work=work, save_seconds=1e9).resumed_at == 0
    assert collect(bundle, short, gram=True, work=work, save_seconds=1e9).resumed_at == 0
    work.write_bytes(work.read_bytes()[:-100])
    assert collect(bundle, short, work=work, save_seconds=1e9).resumed_at == 0


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from titans_calibration import collect
from titans_calibration.options import QuantizeOptions
from titans_calibration.quantize import quantize_bundle
from titans_calibration.recipe import load_recipe

collect.SAVE_SECONDS = 0.0
bundle, output, text, calls = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

@contextmanager
def bar(label, total, unit):
    left = calls
    def step(tokens):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    yield step

options = QuantizeOptions(bundle, output, load_recipe("int8"), (text,), tokens=1100)
print(quantize_bundle(options, bar=bar).resumed_at)
"""


def test_a_killed_command_goes_on_and_writes_the_same_bundle(
    float32_bundle: Path, long_text: Path, tmp_path: Path
) -> None:
    def run(name: str, calls: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(float32_bundle), str(tmp_path / name), str(long_text), str(calls)],
            capture_output=True, text=True, env=environment(), timeout=120,
        )  # fmt: skip

    killed = run("killed.titans", 20)
    assert killed.returncode == -signal.SIGKILL
    assert work_file(tmp_path / "killed.titans").is_file()
    assert not (tmp_path / "killed.titans").exists()
    again, whole = run("killed.titans", 0), run("whole.titans", 0)
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert int(again.stdout) >= 18 * CALL
    assert int(whole.stdout) == 0
    assert sorted(os.listdir(tmp_path)) == ["killed.titans", "whole.titans"]
    for file in (tmp_path / "whole.titans").iterdir():
        assert (tmp_path / "killed.titans" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_number_that_is_not_finite_is_told_with_its_place(float32_bundle: Path, data: Data, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(float32_bundle, tmp_path / "damaged.titans"))
    weights = load_file(damaged / "weights.safetensors")
    token = int(data.streams[0][CALL * 5 + 3])
    first = int(np.flatnonzero(data.streams[0] == token)[0])
    weights["model.embedding"][token, 5] = np.inf
    write_safetensors(damaged / "weights.safetensors", dict(weights))
    reseal(damaged)
    with pytest.raises(BundleError) as raised:
        collect(open_source(read_bundle(damaged)), data)
    message = str(raised.value)
    assert f"position {first // CALL * CALL} of a" in message
    assert "model.layers.0" in message
