"""`titans-export guard`, and `run` with the limits it found. The judge is the synthetic model in numpy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_bundles
from cli_tools import invoke
from synthetic import Reference, Weights, write_bundle

import titans_runtime as rt
from titans_export.bundle import read_bundle
from titans_export.guarding import Piece, find_limits
from titans_export.manifest import Guard, read_manifest

BAD = 255  # the byte that destroys the memory
W0 = "layers.0.memory.W0"
PROSE = b"It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 24


@pytest.fixture(scope="module")
def weights() -> Weights:
    weights = Weights.random(vocab=256)
    weights.embed[BAD] *= 1e4
    return weights


@pytest.fixture
def bundle(tmp_path: Path, weights: Weights) -> Path:
    path = write_bundle(tmp_path / "small.titans", weights)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state"][0]["layout"][0]["kind"] = "weights"
    manifest["later"] = {"kept": True}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE)
    return path


@pytest.fixture
def attack(tmp_path: Path) -> Path:
    path = tmp_path / "attack.txt"
    path.write_bytes(PROSE + bytes([BAD]) * 8 + PROSE)
    return path


def largest_norm(weights: Weights, text: bytes) -> float:
    """Of W at the ends of calls of eight tokens."""
    judge, norms = Reference(weights), [0.0]
    for position, token in enumerate(text, start=1):
        judge.step(token)
        if position % 8 == 0:
            norms.append(float(np.linalg.norm(judge.memory.astype(np.float64))))
    return max(norms)


def guard_of(path: Path) -> Guard:
    found = read_manifest(path).guard
    assert found is not None
    return found


class TestFinding:
    def test_limits_are_multiples_of_the_largest_norms(self, bundle: Path, text: Path, weights: Weights) -> None:
        before = json.loads((bundle / "manifest.json").read_text())
        result = invoke("guard", bundle, "--data", text, "--margin", 3, "--piece", 4096, "--json")
        assert result.code == 0, result.err
        report = result.json()
        norm = largest_norm(weights, PROSE)
        found = report["guard"]["fields"][W0]
        assert found["seen"] == pytest.approx(norm, rel=1e-3) and found["limit"] == pytest.approx(3 * norm, rel=1e-3)
        assert report["guard"]["data"]["tokens"] == len(PROSE) and report["written"] is True
        assert [piece["left_out"] for piece in report["pieces"]] == [None]
        after = json.loads((bundle / "manifest.json").read_text())
        assert after.pop("guard") == report["guard"] and after["later"] == {"kept": True}
        assert read_bundle(bundle).manifest.guard is not None
        assert {**before, "guard": None} == {**after, "guard": None}
        assert [path.name for path in bundle.parent.iterdir() if ".tmp" in path.name] == []

    def test_a_piece_that_diverges_does_not_count(self, bundle: Path, tmp_path: Path, weights: Weights) -> None:
        lines = [list(PROSE[:800]), list(PROSE[:400]) + [BAD] * 3 + list(PROSE[:397]), list(PROSE[:800])]
        data = tmp_path / "streams.jsonl"
        data.write_text("".join(json.dumps({"tokens": line}) + "\n" for line in lines))
        result = invoke("guard", bundle, "--data", data, "--dry-run", "--json")
        assert result.code == 0, result.err
        assert "left out" in result.err and W0 in result.err
        report = result.json()
        assert [piece["left_out"] is None for piece in report["pieces"]] == [True, False, True]
        norm = largest_norm(weights, PROSE[:800])
        assert report["guard"]["fields"][W0]["seen"] == pytest.approx(norm, rel=1e-3)
        assert read_manifest(bundle).guard is None and report["written"] is False

    def test_writing_elsewhere_and_again(self, bundle: Path, text: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.titans"
        result = invoke("guard", bundle, "--data", text, "--policy", "freeze", "-o", other)
        assert result.code == 0, result.err
        assert "policy freeze" in result.out and W0 in result.out
        assert read_manifest(bundle).guard is None
        assert guard_of(other).policy == "freeze" and read_bundle(other).manifest.files == read_manifest(bundle).files
        shown = invoke("inspect", other)
        assert "guard: policy freeze" in shown.out and f"{guard_of(other).limits[W0]}" in shown.out
        invoke("guard", other, "--data", text).check_failure(1, "has limits already", "--overwrite")
        invoke("guard", bundle, "--data", text, "-o", other).check_failure(1, "exists", "--overwrite")
        assert invoke("guard", other, "--data", text, "--overwrite").code == 0
        assert guard_of(other).policy == "rewind"

    def test_clearing_keeps_the_norms(self, bundle: Path, text: Path) -> None:
        assert invoke("guard", bundle, "--data", text).code == 0
        seen = guard_of(bundle).fields[W0].seen
        assert invoke("guard", bundle, "--clear").code == 0
        guard = guard_of(bundle)
        assert (guard.policy, guard.limits, guard.fields[W0].seen, guard.data) == ("off", {}, seen, None)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ([], ["missing --data"]),
            (["--clear", "--data", "x.txt"], ["--clear and --data"]),
            (["--data", "none.txt"], ["none.txt", "does not exist"]),
            (["--data", "TEXT", "--policy", "off", "--restart-every", "5"], ["--policy off", "restart"]),
            (["--data", "TEXT", "--margin", "1"], ["--margin"]),
            (["--data", "TEXT", "-o", "/no/such/folder/a.titans"], ["/no/such/folder"]),
        ],
        ids=str,
    )
    def test_refuses(self, bundle: Path, text: Path, options: list[str], words: list[str]) -> None:
        given = [str(text) if option == "TEXT" else option for option in options]
        result = invoke("guard", bundle, *given)
        result.check_failure(result.code, *words)
        assert result.code in (1, 2) and read_manifest(bundle).guard is None


def test_no_limits_where_every_piece_diverges() -> None:
    pieces = [Piece("a", 0, 10, {W0: 5.0}, "NaN or infinity"), Piece("a", 10, 10, {W0: 1e9}, "W0 diverged")]
    with pytest.raises(Exception, match="no limits in 2 pieces of data: NaN or infinity"):
        find_limits(pieces)
    found = find_limits([*pieces, Piece("b", 0, 10, {W0: 2.0, "layers.0.memory.S0": 0.0})], margin=4)
    assert found.fields[W0].limit == 8.0 and found.fields["layers.0.memory.S0"].limit is None


# ---- run ----


@pytest.fixture
def limited(bundle: Path, text: Path) -> Path:
    assert invoke("guard", bundle, "--data", text, "--policy", "rewind").code == 0
    return bundle


def run(bundle: Path, text: Path, *options: object) -> tuple[dict[str, Any], str]:
    result = invoke("run", bundle, "--text", text, "--threads", 1, "--json", *options)
    assert result.code == 0, result.err
    return result.json(), result.err


def test_the_bundles_policy_is_the_default(limited: Path, attack: Path, text: Path) -> None:
    healthy, err = run(limited, text)
    assert healthy["guard"]["rollbacks"] == 0 and healthy["health"]["state"] == "healthy" and err == ""
    report, err = run(limited, attack)
    guard = report["guard"]
    assert guard["policy"] == "rewind" and guard["reason"] == "norm" and guard["field"] == W0
    assert guard["rollbacks"] > 0 and guard["repairs"] == guard["rollbacks"] and guard["value"] > guard["limit"]
    assert len(PROSE) < guard["position"] <= len(PROSE) + 16
    assert report["learning_at_end"] is True and report["health"]["divergences"] == 0
    assert err.count("the guard acted at position") == 1 and W0 in err and "last healthy mark" in err


def test_a_policy_of_the_command_line(limited: Path, attack: Path) -> None:
    report, err = run(limited, attack, "--guard", "freeze")
    assert report["guard"]["policy"] == "freeze" and report["guard"]["rollbacks"] == 1
    assert report["learning_at_end"] is False and "has stopped learning" in err
    invoke("run", limited, "--text", attack, "--guard", "raise").check_failure(1, W0, "of at most")
    report, _ = run(limited, attack, "--guard", "restart", "--restart-every", 100)
    assert report["guard"]["repairs"] >= 2 * len(PROSE) // 100
    people = invoke("run", limited, "--text", attack, "--guard", "skip")
    assert "chunks rolled back" in people.out


def test_without_a_guard_a_warning_says_so(limited: Path, attack: Path) -> None:
    report, err = run(limited, attack, "--guard", "off")
    health = report["health"]
    assert report["guard"]["rollbacks"] == 0 and health["divergences"] > 0
    assert health["field"] == W0 and health["value"] > health["limit"] > 0
    assert len(PROSE) < health["position"]
    assert err.count("warning: the memory diverges at position") == 1 and "titans-export guard" in err


# ---- in Python, and what export writes ----


def test_health_in_python(limited: Path, weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    with rt.Session(limited, threads=1, guard="off") as session:
        stream = session.stream()
        stream.feed(PROSE, outputs="none")
        assert stream.health.state == "healthy" and stream.health.checks > 0
        assert stream.peak_norms()[W0] == pytest.approx(largest_norm(weights, PROSE), rel=0.2)
        with caplog.at_level(logging.WARNING, "titans_runtime"):
            stream.feed(bytes([BAD]) * 4096, outputs="none")
        assert [record for record in caplog.records if "the memory diverges at position" in record.getMessage()]
        assert stream.health.state == "diverging" and stream.health.field == W0
        assert session.metrics().diverging == session.metrics().divergences == 1
        assert 'titans_diverging_streams{bundle="small.titans"} 1' in session.metrics_text()
        stream.close()
        assert session.metrics().diverging == 0
    with pytest.raises(rt.Error, match="unknown guard"):
        rt.Session(limited, guard="never")


def test_export_writes_the_norms_it_saw() -> None:
    manifest = read_manifest(shared_bundles.mac_bytes())
    guard = manifest.guard
    assert guard is not None and guard.policy == "off" and not guard.limits
    with rt.Session(shared_bundles.mac_bytes(), threads=1) as session:
        stream = session.stream()
        stream.guard("raise")
        stream.feed(PROSE, outputs="none")
        peaks = stream.peak_norms()
        assert set(peaks) == set(manifest.guarded_fields) and stream.health.state == "healthy"
        for name, peak in peaks.items():
            assert peak == 0 or 0 < peak < 32 * (guard.fields[name].seen or 0)
