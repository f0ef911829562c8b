"""titans-export reads these bundles as the runtime does: vectors, offsets, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import GRAPHS, PERIOD, PERIODIC_GRAPHS, Reference, Weights, write_bundle, write_manifest

import titans_runtime as rt

pytest.importorskip("titans_export")
from click.testing import CliRunner

from titans_export.bundle import read_bundle
from titans_export.cli import main
from titans_export.engines.plan import Request, make_plan
from titans_export.errors import BundleError, UsageError
from titans_export.manifest import GraphEntry
from titans_export.schedule import missing, next_graph

SIZE, OUTPUTS = 12, 5


@pytest.fixture(scope="module")
def model() -> Weights:
    return Weights.random(vocab=SIZE, outputs=OUTPUTS)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory, model: Weights) -> Path:
    """With offsets, and with vectors in the tokens' stead."""
    folder = tmp_path_factory.mktemp("bundles") / "vectors.titans"
    return write_bundle(folder, model, PERIODIC_GRAPHS, period=PERIOD, vectors=True)


@pytest.fixture
def copy(vectors: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vectors, tmp_path / "copy.titans"))


def inspect(bundle: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["inspect", str(bundle), *options])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_golden_vectors(vectors: Path, model: Weights) -> None:
    bundle = read_bundle(vectors)
    golden = bundle.golden()
    given, outputs = golden.inputs, golden.values
    assert bundle.takes_vectors
    assert given.shape == (13, SIZE) and given.dtype == np.float32 and outputs.shape == (13, OUTPUTS)
    np.testing.assert_array_equal(outputs, Reference(model, period=PERIOD).feed(given))
    got = rt.Session(vectors).stream().feed(given)
    np.testing.assert_allclose(got, outputs, atol=bundle.tolerance)


def test_golden_tokens(bundle: Path) -> None:
    opened = read_bundle(bundle)
    golden = opened.golden()
    tokens, logits = golden.inputs, golden.values
    assert not opened.takes_vectors
    assert tokens.shape == (13,) and tokens.dtype == np.int32 and logits.shape == (13, 16)


def test_inspect(vectors: Path, bundle: Path) -> None:
    facts = json.loads(inspect(vectors, "--json"))
    assert facts["input"] == {"kind": "vectors", "name": "x", "dtype": "float32", "size": SIZE}
    assert facts["output"] == {"kind": "vectors", "name": "y", "dtype": "float32", "size": OUTPUTS}
    assert facts["vocab_size"] is None
    assert {graph["name"]: graph["offsets"] for graph in facts["graphs"]} == {
        "prefill": [0],
        "middle": [1],
        "decode": [0, 1, 2],
        "halve": [3],
    }
    lines = inspect(vectors).splitlines()
    assert any(f"input vectors of {SIZE} floats, output vectors of {OUTPUTS}" in line for line in lines)
    assert "vocabulary" not in inspect(vectors)
    rows = {line.split()[0]: line.split()[1:4] for line in lines if line.startswith(("decode ", "halve ", "prefill "))}
    assert rows == {"prefill": ["8", "4", "0"], "decode": ["1", "4", "0-2"], "halve": ["1", "4", "3"]}
    facts = json.loads(inspect(bundle, "--json"))
    assert (facts["vocab_size"], facts["input"]["kind"], facts["graphs"][0]["offsets"]) == (16, "tokens", [0])
    assert "vocabulary 16, tokenizer bytes" in inspect(bundle)


def test_graphs_against_onnx(vectors: Path, bundle: Path) -> None:
    pytest.importorskip("polygraphy", reason="optional: pip install polygraphy")
    from titans_export.graph_check import check_graphs

    for path, output, graphs in ((vectors, "y", PERIODIC_GRAPHS), (bundle, "logits", GRAPHS)):
        checks = check_graphs(read_bundle(path), 1e-4)
        assert all(check.passed for check in checks), checks
        assert {check.graph for check in checks if check.output == output} == {graph[0] for graph in graphs}


def test_the_schedule(vectors: Path) -> None:
    """The graph that follows from the words of docs/bundle.md, as the runtime has it too (tests/cpp)."""
    graphs = read_bundle(vectors).manifest.graphs
    names = [next_graph(graphs, at, left).name for at, left in ((0, 8), (0, 7), (1, 9), (1, 1), (3, 9), (7, 1))]
    assert names == ["prefill", "decode", "middle", "decode", "halve", "halve"]


@pytest.mark.parametrize(
    ("graphs", "words"),
    [
        ([(1, 1, [0])], None),
        ([(1, 2, [0]), (1, 4, [1]), (1, 4, [3])], None),
        ([(8, 4, [0]), (8, 4, [1]), (1, 1, [0])], None),
        ([], "a graph with tokens = 1 at every position"),
        ([(4, 1, [0])], "a graph with tokens = 1 at every position"),
        ([(1, 2, [0]), (1, 4, [1])], "also at 3 modulo 4"),
        ([(1, 4, [0, 1]), (1, 6, [3])], "equal tokens"),
        ([(8, 4, [0]), (8, 6, [2]), (1, 1, [0])], "equal tokens"),
        ([(1, 1 << 21, [0])], "repeat within"),
    ],
    ids=str,
)
def test_what_graphs_lack(graphs: list[tuple[int, int, list[int]]], words: str | None) -> None:
    entries = [
        GraphEntry(name=str(i), file="g.onnx", tokens=t, stride=a, offsets=tuple(p), weights=())
        for i, (t, a, p) in enumerate(graphs)
    ]
    found = missing(entries)
    assert found is None if words is None else found is not None and words in found


def _graph(name: str, **change: Any) -> Any:
    return lambda manifest: next(g for g in manifest["graphs"] if g["name"] == name).update(change)


CHANGES = {
    "a offset is not served": lambda m: m["graphs"].pop(),
    "two start together": _graph("halve", offsets=[2, 3]),
    "offsets out of order": _graph("decode", offsets=[1, 0, 2]),
    "offsets twice": _graph("decode", offsets=[0, 1, 2, 2]),
    "a offset beyond stride": _graph("halve", offsets=[4]),
    "a negative offset": _graph("halve", offsets=[-1]),
    "no offsets": _graph("halve", offsets=[]),
    "offsets of another type": _graph("halve", offsets=3),
    "a period too long": _graph("halve", stride=1 << 21),
    "an stride of 0": _graph("decode", stride=0),
    "another kind of input": lambda m: m["input"].update(kind="images"),
    "another type of input": lambda m: m["input"].update(dtype="float16"),
    "no size": lambda m: m["input"].pop("size"),
    "a size of 0": lambda m: m["input"].update(size=0),
    "a size that is a text": lambda m: m["output"].update(size="5"),
    "another kind of output": lambda m: m["output"].update(kind="logits"),
    "another type of output": lambda m: m["output"].update(dtype="float64"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_both_readers_refuse(copy: Path, change: Any) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    write_manifest(copy, manifest)
    with pytest.raises(BundleError, match=r"^\[manifest.json\] .+\. Fix: copy or export .+ \(TITANS-E0205\)$"):
        read_bundle(copy)
    with pytest.raises(rt.Error, match=r"\[manifest.json\] .+\. Fix: .+ \(TITANS-E0205\)$"):
        rt.Session(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["golden"].pop("vectors"),
        lambda m: m["golden"].update(outputs=3),
        lambda m: m.update(tokenizer={"kind": "bytes"}),
    ],
    ids=["no vectors", "outputs of another type", "a tokenizer"],
)
def test_what_titans_export_refuses(copy: Path, change: Any) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    write_manifest(copy, manifest)
    with pytest.raises(BundleError):
        read_bundle(copy)


def test_an_engine_needs_graphs_for_every_phase(vectors: Path) -> None:
    bundle = read_bundle(vectors)
    for graphs, wanted in ((("decode",), "add --graph halve"), (("prefill",), "add --graph decode --graph halve")):
        with pytest.raises(UsageError, match=wanted):
            make_plan(bundle, Request("cpu", graphs=graphs))
    plan = make_plan(bundle, Request("cpu", graphs=("decode", "halve")))
    assert [graph.name for graph in plan.graphs] == ["decode", "halve"]
