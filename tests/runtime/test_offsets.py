"""Graphs that start at offsets of a period, against the same model in numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import PERIOD, PERIODIC_GRAPHS, Reference, Weights, write_bundle, write_manifest

import titans_runtime as rt

TOKENS = np.random.default_rng(1).integers(0, 16, 53)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_stream.py


@pytest.fixture(scope="module")
def periodic(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "periodic.titans"
    return write_bundle(folder, weights, PERIODIC_GRAPHS, period=PERIOD)


@pytest.fixture(scope="module")
def session(periodic: Path) -> rt.Session:
    return rt.Session(periodic, threads=1)


@pytest.fixture(scope="module")
def expected(weights: Weights) -> Any:
    return Reference(weights, period=PERIOD).feed(TOKENS)


def test_the_period_shows(weights: Weights, expected: Any) -> None:
    """Or else these tests would not tell which graph ran."""
    assert np.abs(Reference(weights).feed(TOKENS) - expected)[PERIOD:].max() > 0.1


@pytest.mark.parametrize(
    "cuts",
    [[53], [1] * 53, [3, 5, 8, 37], [1, 2, 50], [4] * 13 + [1], [2, 11, 40], [7] * 7 + [4]],
    ids=lambda cuts: "-".join(map(str, cuts[:5])),
)
def test_any_cut_gives_the_same_logits(session: rt.Session, cuts: list[int], expected: Any) -> None:
    stream = session.stream()
    parts = np.split(TOKENS, np.cumsum(cuts)[:-1])
    np.testing.assert_allclose(np.concatenate([stream.feed(part) for part in parts]), expected, **TOLERANCE)


@pytest.mark.parametrize("at", range(2 * PERIOD))
def test_a_fork_and_a_failure_at_every_phase(session: rt.Session, expected: Any, at: int) -> None:
    stream = session.stream()
    stream.feed(TOKENS[:at], outputs="none")
    with pytest.raises(rt.Error):
        stream.feed([1, 2, 99])
    twin = stream.fork()
    for one in (stream, twin):
        np.testing.assert_allclose(one.step(int(TOKENS[at])), expected[at], **TOLERANCE)
        np.testing.assert_allclose(one.feed(TOKENS[at + 1 :]), expected[at + 1 :], **TOLERANCE)


def test_the_info_tells_phases(session: rt.Session, bundle: Path) -> None:
    offsets = {graph["name"]: graph["offsets"] for graph in session.info["graphs"]}
    assert offsets == {"prefill": [0], "middle": [1], "decode": [0, 1, 2], "halve": [3]}
    assert all(graph["offsets"] == [0] for graph in rt.Session(bundle).info["graphs"])


@pytest.mark.parametrize(
    ("graph", "change", "words"),
    [
        ("halve", None, ["tokens = 1", "3 modulo 4"]),
        ("halve", {"offsets": [2, 3]}, ["equal tokens", "decode", "halve"]),
        ("halve", {"stride": 8}, ["tokens = 1", "7 modulo 8"]),
        ("halve", {"stride": 2, "offsets": [1]}, ["equal tokens"]),
        ("decode", {"offsets": [2, 1, 0]}, ["offsets[1]"]),
        ("decode", {"offsets": [0, 1, 1, 2]}, ["offsets[2]"]),
        ("decode", {"offsets": [0, 1, 2, 4]}, ["offsets[3]"]),
        ("decode", {"offsets": [-1, 0, 1, 2]}, ["offsets[0]"]),
        ("decode", {"offsets": []}, ["offsets", "at least one"]),
        ("decode", {"offsets": 3}, ["offsets"]),
        ("halve", {"stride": 1 << 21}, ["tokens = 1", "repeat within"]),
    ],
    ids=str,
)
def test_graphs_that_are_no_schedule(
    periodic: Path, tmp_path: Path, graph: str, change: dict[str, Any] | None, words: list[str]
) -> None:
    folder = Path(shutil.copytree(periodic, tmp_path / "wrong.titans"))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["graphs"] if entry["name"] == graph)
    if change is None:
        manifest["graphs"].remove(entry)
    else:
        entry.update(change)
    write_manifest(folder, manifest)
    with pytest.raises(rt.Error, match="manifest") as caught:
        rt.Session(folder)
    assert caught.value.status == 1
    for word in words:
        assert word in str(caught.value)


def test_an_engine_has_graphs_for_every_phase(periodic: Path, tmp_path: Path) -> None:
    from test_engines import entry

    folder = Path(shutil.copytree(periodic, tmp_path / "engine.titans"))
    manifest = json.loads((folder / "manifest.json").read_text())
    graphs = [{"graph": name, "file": f"{name}.onnx"} for name in ("decode", "halve")]
    manifest["engines"] = [entry("small", graphs)]
    write_manifest(folder, manifest)
    assert [graph["name"] for graph in rt.Session(folder, engine="none").info["graphs"]][-2:] == ["decode", "halve"]
    manifest["engines"] = [entry("small", graphs[:1])]
    write_manifest(folder, manifest)
    with pytest.raises(rt.Error, match=r"engines\[0\].graphs: .*also at 3 modulo 4"):
        rt.Session(folder)
