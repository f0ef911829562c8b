"""`inspect` of a state file and `diff` of two: against numbers known beforehand, and against streams that run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import TEXT, invoke, spawn
from state_files import kind_of, memory_entry, write_rows, write_state

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

pytest_plugins = ["cli_fixtures"]
NAN = float("nan")


def by_hand(**changes: Any) -> dict[str, np.ndarray]:
    """Two heads of 2 x 2: ||W|| 5 and 10, ||S|| 0.5 and 0; the first stands between chunks, the second inside one."""
    fields: dict[str, Any] = {
        "W0": [[[3, 0], [0, 4]], [[0, 6], [8, 0]]],
        "S0": [[[0.3, 0], [0, 0.4]], [[0, 0], [0, 0]]],
        "layer_input0": [[[9, 9], [9, 9]], [[2, 0], [NAN, NAN]]],
        "output_grad0": [[[9, 9], [9, 9]], [[0, 3], [NAN, NAN]]],
        "e": [[0, 0], [0.5, 0]],
        "a": [[0, 0], [0.5, 0]],
        "m": [1, 1],
        "f": [0, 0],
        "beta": [1, 0.9],
    }
    return {name: np.array(values, np.float32) for name, values in (fields | changes).items()}


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    return write_state(tmp_path / "hand.tstate", {"layers.0.memory": by_hand()}, {"keys": np.ones((1, 3), np.float32)})


@pytest.fixture(scope="module")
def read(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The state of a stream that has read a text, and its memory as the stream gives it."""
    path = tmp_path_factory.mktemp("states") / "read.tstate"
    with rt.Session(shared_bundle, threads=1) as session:
        stream = session.stream()
        stream.feed(TEXT[:201], outputs="none")
        stream.save(path)
        return path, stream.memory()


def test_numbers_known_beforehand(hand: Path) -> None:
    result = invoke("inspect", hand, "--json")
    assert result.code == 0, result.err
    facts = result.json()
    assert facts["finite"]
    assert (facts["producer"], facts["position"], facts["learning"]) == ("test 1.0", 64, True)
    assert facts["model"]["name"] == "by-hand"
    assert facts["memory_dtype"]["dtype"] == "float32"
    assert facts["bytes"] == hand.stat().st_size
    assert [(t["name"], t["bytes"]) for t in facts["tensors"]] == [("layers.0.memory", 2 * 32 * 4), ("keys", 12)]
    (memory,) = facts["memories"]
    weights, surprise = memory["weights"], memory["surprise"]
    assert weights["head_norms"] == [5, 10]
    assert weights["largest_head"] == 1
    assert weights["max_abs"] == 8
    assert math.isclose(weights["norm"], math.sqrt(125))
    assert math.isclose(weights["rms"], math.sqrt(125 / 8))
    assert np.allclose(surprise["head_norms"], [0.5, 0], rtol=1e-6)
    assert surprise["largest_head"] == 0
    assert np.allclose(memory["step"], [0.1, 0], rtol=1e-6)
    # Head 1: W' - W = -0.1 W - 0.5 [2 0]^T [0 3], so -0.6 - 3 above and -0.8 below.
    assert np.allclose(memory["open_chunk"], [0, math.sqrt(3.6**2 + 0.8**2) / 10], rtol=1e-6)
    assert memory["from_fresh"] is None
    saturation = memory["saturation"]
    assert (saturation["dtype"], saturation["elements"], saturation["dead_blocks"]) == ("float32", 16, None)
    assert (saturation["at_limit"], saturation["zero"]) == (0, 10 / 16)


def test_a_person_can_read_it(hand: Path) -> None:
    text = invoke("inspect", hand).out
    assert "by-hand (lmm), position 64, learning" in text
    assert "memory dtype float32" in text
    (row,) = [line for line in text.splitlines() if line.startswith("layers.0.memory")]
    assert row.split("  ")[0] == "layers.0.memory"
    for cell in ("11.2", "10 (head 1 of 2)", "0.5 (head 0 of 2)", "10 % (head 0)", "36.9 % (head 1)"):
        assert cell in row
    assert len(text.splitlines()) <= 12


def test_what_is_not_finite_is_told_first(tmp_path: Path) -> None:
    fields = by_hand()
    fields["S0"][1, 0, 1] = NAN
    fields["W0"][0, 0, :] = math.inf
    keys = np.array([[1, NAN]], np.float32)
    path = write_state(tmp_path / "bad.tstate", {"layers.0.memory": fields}, {"layers.0.keys": keys})
    result = invoke("inspect", path)
    result.check_failure(3, "layers.0.memory.W0", "2 more")
    assert result.out.splitlines()[:3] == [
        "NOT FINITE: 2 infinite in layers.0.memory.W0, head 0",
        "NOT FINITE: 1 NaN in layers.0.memory.S0, head 1",
        "NOT FINITE: 1 NaN in layers.0.keys",
    ]
    facts = invoke("inspect", path, "--json").json()
    assert not facts["finite"]
    assert [entry["heads"] for entry in facts["not_finite"]] == [[0], [1], None]
    assert facts["memories"][0]["weights"]["norm"] is None


def test_a_row_of_the_open_chunk_counts_once_it_is_used(tmp_path: Path) -> None:
    fields = by_hand(a=[[0, 0], [0.5, 0.1]])
    result = invoke("inspect", write_state(tmp_path / "bad.tstate", {"memory": fields}))
    result.check_failure(3, "2 NaN in memory.layer_input0, head 1")


def _field(name: str, offset: int, shape: list[int], dtype: str) -> dict[str, Any]:
    return {"name": name, "offset": offset, "shape": shape, "dtype": dtype, "kind": kind_of(name)}


def _blocks(memory_dtype: str, large: int, one: int) -> np.ndarray:
    """A row with W0 and S0 of 2 x 32 each: codes in 16 words, two bfloat16 scales in one more."""
    raw = np.zeros((1, 1, 48 * 4), np.uint8)
    w0, s0 = raw[0, 0, :68], raw[0, 0, 68:136]
    w0[:4], w0[4:32] = large, one
    w0[64:66] = (0x80, 0x3F)  # 1.0
    s0[0] = large | 0x80 if memory_dtype == "fp8" else 256 - large
    s0[64:66] = (0x00, 0x3F)  # 0.5
    return raw.view(np.float32)


@pytest.mark.parametrize(("memory_dtype", "large", "one", "value"), [("int8", 127, 1, 127), ("fp8", 0x7E, 0x38, 448)])
def test_saturation_of_blocks(memory_dtype: str, large: int, one: int, value: int, tmp_path: Path) -> None:
    layout = [
        {"name": n, "offset": at, "shape": [2, 32], "dtype": memory_dtype, "kind": kind_of(n)}
        for n, at in (("W0", 0), ("S0", 17))
    ]
    entry = memory_entry("memory", layout, 1, 48)
    kept = {"dtype": memory_dtype, "rounding": "nearest", "seed": 0}
    path = write_rows(tmp_path / "blocks.tstate", [entry], {"memory": _blocks(memory_dtype, large, one)}, memory=kept)
    result = invoke("inspect", path, "--json")
    assert result.code == 0, result.err
    (memory,) = result.json()["memories"]
    assert math.isclose(memory["weights"]["norm"], math.sqrt(4 * value**2 + 28))
    assert math.isclose(memory["surprise"]["norm"], value / 2)
    assert memory["saturation"] == {
        "dtype": memory_dtype, "elements": 128, "at_limit": 5 / 128, "zero": 95 / 128, "dead_blocks": 0.5,
    }  # fmt: skip
    assert "dead blocks" in invoke("inspect", path).out


def test_saturation_of_float16(tmp_path: Path) -> None:
    row = np.zeros((1, 1, 16), np.float32)
    row.view(np.float16)[0, 0, :8] = [65504, -65504, 1, 0, 2, 0, 0, 0]
    fields = [
        {"name": n, "offset": at, "shape": [1, 4], "dtype": "float16", "kind": kind_of(n)}
        for n, at in (("W0", 0), ("S0", 2))
    ]
    kept = {"dtype": "float16", "rounding": "nearest", "seed": 0}
    path = write_rows(tmp_path / "half.tstate", [memory_entry("memory", fields, 1, 16)], {"memory": row}, memory=kept)
    (memory,) = invoke("inspect", path, "--json").json()["memories"]
    assert (memory["saturation"]["at_limit"], memory["saturation"]["zero"]) == (2 / 8, 4 / 8)


def test_a_layout_beyond_its_row_is_refused(tmp_path: Path) -> None:
    layout = [{"name": "W0", "offset": 10, "shape": [2, 32]}]
    rows = {"memory": np.ones((1, 1, 48), np.float32)}
    path = write_rows(tmp_path / "odd.tstate", [memory_entry("memory", layout, 1, 48)], rows)
    result = invoke("inspect", path)
    result.check_failure(1, "layout[0]: expected a field of at most 48 elements")


def test_a_stream_that_has_read(read: tuple[Path, dict[str, np.ndarray]], shared_bundle: Path) -> None:
    path, memory = read
    with rt.Session(shared_bundle, threads=1) as session:
        fresh = session.stream().memory()
        info = session.info
    result = invoke("inspect", path, "--bundle", shared_bundle, "--json")
    assert result.code == 0, result.err
    facts = result.json()
    assert facts["position"] == 201
    assert facts["model"]["weights_sha256"] == info["model"]["source"]["weights_sha256"]
    assert [m["name"] for m in facts["memories"]] == ["layers.0.memory"]
    (found,) = facts["memories"]
    now, then = (fields["layers.0.memory.W0"].astype(np.float64) for fields in (memory, fresh))
    moved = np.linalg.norm((now - then)[0].reshape(2, -1), axis=1)
    assert np.allclose(found["from_fresh_heads"], moved)
    assert moved.min() > 0.01
    assert math.isclose(found["from_fresh"], np.linalg.norm(now - then))
    assert math.isclose(found["weights"]["norm"], np.linalg.norm(now))
    assert math.isclose(found["fresh_weights"]["norm"], np.linalg.norm(then))
    assert math.isclose(found["surprise"]["norm"], np.linalg.norm(memory["layers.0.memory.S0"].astype(np.float64)))
    assert min(found["open_chunk"]) > 0  # 201 is one token into a chunk of 4
    assert "|W - F|" in invoke("inspect", path, "--bundle", shared_bundle).out


def test_the_open_chunk_is_what_its_update_changes(shared_bundle: Path, tmp_path: Path) -> None:
    """Of a chunk of 4, the fourth token frozen: it changes nothing, so the chunk update is that of the three before."""
    with rt.Session(shared_bundle, threads=1) as session:
        stream = session.stream()
        stream.feed(TEXT[:103], outputs="none")
        stream.save(tmp_path / "open.tstate")
        before = stream.memory()["layers.0.memory.W0"][0].astype(np.float64)
        stream.freeze()
        stream.feed(TEXT[103:104], outputs="none")
        after = stream.memory()["layers.0.memory.W0"][0].astype(np.float64)
    (memory,) = invoke("inspect", tmp_path / "open.tstate", "--json").json()["memories"]
    change = np.linalg.norm((after - before).reshape(2, -1), axis=1) / np.linalg.norm(before.reshape(2, -1), axis=1)
    assert change.min() > 1e-4
    assert np.allclose(memory["open_chunk"], change, rtol=1e-3)


def test_a_bundle_of_another_model(read: tuple[Path, dict[str, np.ndarray]], hand: Path, shared_bundle: Path) -> None:
    invoke("inspect", hand, "--bundle", shared_bundle).check_failure(1, "by-hand")
    invoke("inspect", read[0], "--bundle", hand.parent).check_failure(1, "manifest.json")


def test_numpy(read: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, memory = read
    target = tmp_path / "memory.npz"
    target.write_text("before")
    assert invoke("inspect", path, "--numpy", target).code == 0
    with np.load(target) as arrays:
        assert set(arrays) == set(memory)
        for name, values in memory.items():
            assert arrays[name].dtype == np.float32
            assert np.array_equal(arrays[name], values)
    assert [entry.name for entry in tmp_path.iterdir()] == ["memory.npz"]
    invoke("inspect", path, "--numpy", tmp_path / "none" / "memory.npz").check_failure(1, "create the folder first")


def test_encrypted(shared_bundle: Path, tmp_path: Path) -> None:
    key, path = bytes(range(32)), tmp_path / "secret.tstate"
    with rt.Session(shared_bundle, threads=1) as session:
        stream = session.stream()
        stream.feed(TEXT[:40], outputs="none")
        try:
            stream.save(path, key=key)
        except rt.Error as error:
            if error.status == 4:
                pytest.skip(str(error))
            raise
    for name, content in (("raw", key), ("hex", key.hex().encode() + b"\n"), ("wrong", bytes(32)), ("short", key[:31])):
        (tmp_path / name).write_bytes(content)
    for name in ("raw", "hex"):
        facts = invoke("inspect", path, "--key-file", tmp_path / name, "--json").json()
        assert facts["encrypted"]
        assert facts["position"] == 40
    assert invoke("diff", path, path, "--key-file", tmp_path / "raw").code == 0
    invoke("inspect", path).check_failure(2, "--key-file")
    invoke("inspect", path, "--key-file", tmp_path / "wrong").check_failure(1)
    invoke("inspect", path, "--key-file", tmp_path / "short").check_failure(1, "32 bytes or 64 hexadecimal digits")
    invoke("inspect", path, "--key-file", tmp_path / "none").check_failure(1, "none")


def test_a_key_is_not_needed_for_a_plain_state(hand: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    assert invoke("inspect", hand, "--key-file", tmp_path / "key").code == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "foreign", "newer", "missing", "folder"])
def test_a_damaged_or_foreign_file(damage: str, hand: Path, shared_bundle: Path, tmp_path: Path) -> None:
    path, raw = tmp_path / "damaged.tstate", bytearray(hand.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[:-5])
    elif damage == "flip":
        raw[-9] ^= 1
        path.write_bytes(raw)
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"Once upon a time, " * 20)
    elif damage == "foreign":
        shutil.copy(shared_bundle / "weights.safetensors", path)
    elif damage == "newer":
        write_state(path, {"memory": by_hand()}, schema_version="99")
    elif damage == "folder":
        path.mkdir()
    for command in (("inspect", path), ("diff", hand, path)):
        result = invoke(*command)
        result.check_failure(4 if damage == "newer" else 1)
        assert "internal" not in result.err
        assert result.out == ""


@pytest.mark.parametrize("option", ["--bundle", "--numpy", "--key-file"])
def test_options_of_states_with_a_bundle(option: str, shared_bundle: Path, tmp_path: Path) -> None:
    invoke("inspect", shared_bundle, option, tmp_path / "x").check_failure(2, option)


def test_a_stream_and_its_fork(shared_bundle: Path, tmp_path: Path) -> None:
    """Identical until one of them reads on; then the distances are those of the streams' own memories."""
    paths = [tmp_path / name for name in ("a.tstate", "b.tstate")]
    with rt.Session(shared_bundle, threads=1) as session:
        stream = session.stream()
        stream.feed(TEXT[:200], outputs="none")
        fork = stream.fork()
        for one, path in zip((stream, fork), paths, strict=True):
            one.save(path)
        same = invoke("diff", *paths, "--json")
        fork.feed(TEXT[300:340], outputs="none")
        fork.save(paths[1])
        memories = [one.memory() for one in (stream, fork)]
    assert same.code == 0, same.err
    facts = same.json()
    assert facts["identical"]
    assert facts["largest_distance"] == 0
    assert facts["fields"] == []

    result = invoke("diff", *paths, "--json")
    result.check_failure(3, "states differ", "TITANS-E0903")
    facts = result.json()
    assert (facts["identical"], facts["passed"], facts["positions"]) == (False, False, [200, 240])
    (found,) = facts["memories"]
    for letter, key in (("W0", "weights"), ("S0", "surprise")):
        a, b = (memory[f"layers.0.memory.{letter}"].astype(np.float64).ravel() for memory in memories)
        distance = np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b))
        assert math.isclose(found[key]["distance"], distance, rel_tol=1e-9)
        assert math.isclose(found[key]["cosine"], a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel_tol=1e-9)
    largest = facts["largest_distance"]
    assert largest == max(found["weights"]["distance"], found["surprise"]["distance"]) > 0
    distances = [field["distance"] for field in facts["fields"]]
    assert distances == sorted(distances, reverse=True)
    assert invoke("diff", *paths, "--tolerance", largest * 1.001).code == 0
    result = invoke("diff", *paths, "--tolerance", largest * 0.999)
    result.check_failure(3, "expected a distance of at most")
    assert result.out.startswith("different, largest distance ")


def test_a_difference_of_one_bit_or_of_the_position_alone(tmp_path: Path) -> None:
    fields = by_hand()
    first = write_state(tmp_path / "a.tstate", {"memory": fields})
    moved = write_state(tmp_path / "b.tstate", {"memory": fields}, position="65")
    frozen = write_state(tmp_path / "c.tstate", {"memory": fields}, learning="false")
    again = write_state(tmp_path / "d.tstate", {"memory": fields}, created="2026-11-25T12:00:00Z")
    assert invoke("diff", first, again).code == 0
    invoke("diff", first, moved).check_failure(3, "positions 64 and 65")
    assert invoke("diff", first, moved, "--tolerance", 0).code == 0
    invoke("diff", first, frozen).check_failure(3)
    fields["W0"][1, 1, 0] = np.nextafter(np.float32(8), np.float32(9))
    result = invoke("diff", first, write_state(tmp_path / "e.tstate", {"memory": fields}), "--json")
    result.check_failure(3)
    assert [field["name"] for field in result.json()["fields"]] == ["memory.W0"]
    assert result.json()["memories"][0]["farthest_head"] == 1


def test_states_of_different_models(hand: Path, read: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    invoke("diff", hand, read[0]).check_failure(1, "states of different models", "of by-hand")
    smaller = {name: values[:1] for name, values in by_hand().items()}
    one = write_state(tmp_path / "one.tstate", {"memory": by_hand()})
    other = write_state(tmp_path / "other.tstate", {"memory": smaller})
    invoke("diff", one, other).check_failure(1, "different shapes of memory.W0")


def test_states_of_one_model_in_two_memory_dtypes(tmp_path: Path) -> None:
    values = np.array([[[1, 2, -3, 0.5]]], np.float32)
    whole = write_state(tmp_path / "whole.tstate", {"memory": {"W0": values, "S0": 0 * values}})
    row = np.zeros((1, 1, 16), np.float32)
    row.view(np.float16)[0, 0, :4] = [1, 2, -3, 0.625]
    fields = [
        {"name": n, "offset": at, "shape": [1, 4], "dtype": "float16", "kind": kind_of(n)}
        for n, at in (("W0", 0), ("S0", 2))
    ]
    kept = {"dtype": "float16", "rounding": "nearest", "seed": 0}
    half = write_rows(tmp_path / "half.tstate", [memory_entry("memory", fields, 1, 16)], {"memory": row}, memory=kept)
    facts = invoke("diff", whole, half, "--tolerance", 0.04, "--json").json()
    assert facts["passed"]
    assert not facts["identical"]
    assert math.isclose(facts["memories"][0]["weights"]["distance"], 0.125 / math.sqrt(14.390625), rel_tol=1e-9)


def test_fields_count_by_their_kind_and_not_by_their_name(tmp_path: Path) -> None:
    names = {"kernel": "weights", "velocity": "surprise", "seen": "open_chunk", "W0": "coefficient"}
    fields = [
        {"name": name, "offset": 2 * at, "shape": [2], "kind": kind} for at, (name, kind) in enumerate(names.items())
    ]
    rows = np.zeros((2, 1, 1, 16), np.float32)
    rows[:, 0, 0, :8] = [[3, 4, 1, 0, 0, 0, 5, 5], [3, 4, 0, 1, 9, 9, 6, 6]]
    first, second = (
        write_rows(tmp_path / f"{at}.tstate", [memory_entry("memory", fields, 1, 16)], {"memory": rows[at]})
        for at in range(2)
    )
    result = invoke("diff", first, second, "--json").json()
    assert [field["name"] for field in result["fields"]] == ["memory.velocity"]
    assert result["memories"][0]["weights"]["norms"] == [5, 5]
    assert math.isclose(result["memories"][0]["surprise"]["distance"], math.sqrt(2), rel_tol=1e-9)
    assert invoke("inspect", first, "--json").json()["memories"][0]["weights"]["norm"] == 5


def test_torch_is_not_needed(hand: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "onnx.py").write_text("raise ImportError('no onnx here')")
    environment = {"PYTHONPATH": str(tmp_path)}
    result = spawn("inspect", hand, "--json", **environment)
    assert result.code == 0, result.err
    assert spawn("diff", hand, hand, **environment).code == 0
