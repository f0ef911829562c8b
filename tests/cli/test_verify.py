"""`verify` finds what is wrong, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_tools import invoke, reseal, save_model
from safetensors.numpy import load_file, save_file

from titans_export.model import MemoryConfig
from titans_export.verify import Distance, random_cuts, row_errors

pytest_plugins = ["cli_fixtures"]
FEEDS = {"whole", "token_by_token", "random_cuts"}


def spoil_golden(bundle: Path, position: int, value: float) -> None:
    """Changes one logit that the runtime is to reproduce."""
    tensors = load_file(bundle / "golden.safetensors")
    tensors["logits"][position, 3] += value
    save_file(tensors, bundle / "golden.safetensors")
    reseal(bundle)


class TestGolden:
    def test_passes(self, shared_bundle: Path) -> None:
        result = invoke("verify", shared_bundle, "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert report["passed"] is True
        assert report["first_bad_position"] is None
        assert 0 < report["max_abs_error"] <= report["tolerance"] == 1e-4
        assert report["positions"] == 64
        assert set(report["feeds"]) == FEEDS
        assert min(report["graphs"].values()) > 0 and set(report["graphs"]) == {"chunk", "decode"}

    def test_graphs_that_did_not_run(self, shared_bundle: Path) -> None:
        result = invoke("verify", shared_bundle, "--tokens", 3, "--json")
        assert result.code == 0
        assert result.json()["graphs"] == {"chunk": 0, "decode": 9}
        assert "graph chunk did not run" in result.err

    def test_passes_with_standard_operators(self, shared_bundle: Path) -> None:
        report = invoke("verify", shared_bundle, "--memory-kernel", "off", "--json").json()
        assert report["passed"] is True
        assert report["memory_kernel"] == "standard-operators"

    def test_says_where(self, bundle: Path) -> None:
        spoil_golden(bundle, 41, 0.01)
        result = invoke("verify", bundle, "--json")
        result.check_failure(3, "position 41")
        report = result.json()
        assert report["passed"] is False
        assert report["first_bad_position"] == 41
        assert report["max_abs_error"] == pytest.approx(0.01, rel=0.01)
        assert invoke("verify", bundle, "--tolerance", 0.02).code == 0
        assert invoke("verify", bundle, "--tokens", 41).code == 0

    def test_nan_is_a_mismatch(self, bundle: Path) -> None:
        spoil_golden(bundle, 5, float("nan"))
        result = invoke("verify", bundle, "--json")
        result.check_failure(3, "position 5")
        assert result.json()["first_bad_position"] == 5

    def test_other_weights(self, bundle: Path) -> None:
        raw = bytearray((bundle / "weights.safetensors").read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        values = np.frombuffer(raw, np.float32, offset=start)
        values += np.float32(0.01)
        (bundle / "weights.safetensors").write_bytes(raw)
        reseal(bundle)
        invoke("verify", bundle).check_failure(3, "position 0")

    def test_for_people(self, bundle: Path) -> None:
        spoil_golden(bundle, 41, 0.01)
        result = invoke("verify", bundle)
        assert "token by token" in result.out
        assert "41" in result.out


class TestAgainst:
    def test_random_tokens(self, shared_bundle: Path, checkpoint: Path) -> None:
        result = invoke("verify", shared_bundle, "--against", checkpoint, "--tokens", 90, "--cuts", 5, "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert report["passed"] is True
        assert report["positions"] == 90
        assert 0 < report["pytorch_float32_to_float64"] < 1e-4
        assert set(report["feeds"]) == FEEDS

    def test_text(self, shared_bundle: Path, checkpoint: Path, text: Path) -> None:
        args = ("verify", shared_bundle, "--against", checkpoint, "--text", text, "--tokens", 50, "--json")
        assert invoke(*args).json()["positions"] == 50

    def test_another_checkpoint(self, shared_bundle: Path, tmp_path: Path) -> None:
        memory = MemoryConfig(heads=2, head_dim=8, chunk=4)
        other = save_model(tmp_path / "other", variant="lmm", memory=memory)
        result = invoke("verify", shared_bundle, "--against", other, "--tokens", 8)
        result.check_failure(3)
        assert "the weights of" in result.err

    def test_an_empty_text(self, shared_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").touch()
        args = ("verify", shared_bundle, "--against", checkpoint, "--text", tmp_path / "empty.txt")
        invoke(*args).check_failure(1, "empty")


class TestPolygraphy:
    def test_passes(self, shared_bundle: Path) -> None:
        pytest.importorskip("polygraphy", reason="optional: pip install polygraphy")
        result = invoke("verify", shared_bundle, "--polygraphy", "--json")
        assert result.code == 0, result.err
        checks = result.json()["polygraphy"]
        state = json.loads((shared_bundle / "manifest.json").read_text())["state"]
        wanted = {"logits", *(entry["output"] for entry in state)}
        for graph in ("chunk", "decode"):
            assert {check["output"] for check in checks if check["graph"] == graph} == wanted
        assert all(check["passed"] and check["max_abs_error"] < 1e-4 for check in checks)
        assert any(check["max_abs_error"] > 0 for check in checks), "two implementations never agree to the bit"

    def test_fails(self, shared_bundle: Path) -> None:
        pytest.importorskip("polygraphy", reason="optional: pip install polygraphy")
        result = invoke("verify", shared_bundle, "--polygraphy", "--tolerance", 1e-9, "--json")
        result.check_failure(3)
        assert not all(check["passed"] for check in result.json()["polygraphy"])

    def test_is_missing(self, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "titans_export.graph_check", raising=False)
        for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "polygraphy", None)
        invoke("verify", shared_bundle, "--polygraphy").check_failure(4, "pip install polygraphy")


def test_random_cuts_leave_nothing_out() -> None:
    tokens = np.arange(500, dtype=np.int32)
    cuts = list(random_cuts(tokens, 32, np.random.default_rng(0)))
    sizes = {len(cut) for cut in cuts}
    assert np.array_equal(np.concatenate(cuts), tokens)
    assert 0 in sizes
    assert 1 in sizes
    assert max(sizes) > 32


def test_distance_counts_from_the_start_of_the_stream() -> None:
    distance = Distance()
    right = np.zeros((4, 2), np.float32)
    distance.add(row_errors(right, right), 0, 0.1)
    got = right.copy()
    got[2, 1] = 0.5
    distance.add(row_errors(got, right), 4, 0.1)
    got[:] = np.nan
    distance.add(row_errors(got, right), 8, 0.1)
    distance.add(row_errors(right[:0], right[:0]), 12, 0.1)
    assert distance.first_bad_position == 6
    assert distance.max_abs_error == np.inf
