from __future__ import annotations

import math
from pathlib import Path

from cli_tools import invoke

pytest_plugins = ["cli_fixtures"]


def test_json(shared_bundle: Path) -> None:
    result = invoke("inspect", shared_bundle, "--json")
    assert result.code == 0, result.err
    facts = result.json()
    assert facts["model"]["variant"] == "mac"
    assert facts["hashes"] == "ok"
    assert {"backend": "onnxruntime", "device": "cpu"} in facts["targets"]
    assert sum(entry["bytes"] for entry in facts["state"]) == facts["state_bytes"]
    for entry in facts["state"]:
        assert entry["bytes"] == 4 * math.prod(entry["shape"])
    on_disk = {path.name: path.stat().st_size for path in shared_bundle.iterdir()}
    assert {entry["name"]: entry["bytes"] for entry in facts["files"]} == on_disk


def test_graphs(shared_bundle: Path) -> None:
    graphs = {graph["name"]: graph for graph in invoke("inspect", shared_bundle, "--json").json()["graphs"]}
    assert (graphs["decode"]["tokens"], graphs["decode"]["stride"]) == (1, 1)
    assert (graphs["chunk"]["tokens"], graphs["chunk"]["stride"]) == (4, 4)
    for graph in graphs.values():
        assert graph["operators"]["NeuralMemory"] == len(graph["neural_memory"]) == 2
        modes = [node["attributes"]["mode"] for node in graph["neural_memory"]]
        assert sorted(modes) == ["read", "update"]
        assert all(node["attributes"]["widths"] == [8, 8] for node in graph["neural_memory"])


def test_text(shared_bundle: Path) -> None:
    text = invoke("inspect", shared_bundle).out
    for word in ("mac", "decode", "layers.0.memory", "widths 8x8", "weights.safetensors", "onnxruntime on cpu"):
        assert word in text
