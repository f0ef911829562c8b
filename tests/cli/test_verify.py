"""`verify` finds what is wrong, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import invoke, reseal, save_model
from safetensors.numpy import load_file, save_file

from titans_export.boundaries import OPERATIONS, multiples
from titans_export.model import MemoryConfig
from titans_export.verifying import Distance, random_cuts, row_errors

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
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


CHUNK = 4  # the model's; its window has 8 rows

Wrapped = Callable[..., Any]


def frozen_at(residue: int, original: Wrapped) -> Wrapped:
    """A method of a stream or session that freezes the stream it returns, or its own, at some positions only."""

    def faulty(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        stream = self if result is None else result
        if stream.position and stream.position % CHUNK == residue:
            stream.freeze()
        return result

    return faulty


def wrong_cut(residue: int, original: Wrapped) -> Wrapped:
    """A feed of several tokens whose first output is wrong if it begins there."""

    def faulty(self: Any, tokens: Any, outputs: str = "all", **more: Any) -> Any:
        start = self.position
        rows = original(self, tokens, outputs, **more)
        if len(tokens) > 1 and start and start % CHUNK == residue and rows is not None:
            rows[0, 0] += 0.01
        return rows

    return faulty


def wrong_batch(residue: int, mode: str, error: float, original: Wrapped) -> Wrapped:
    """A batch in which a stream that begins there gets outputs with the error, or the next larger numbers."""

    def faulty(self: Any, streams: Any, sequences: Any, outputs: str = "last") -> Any:
        starts = [stream.position for stream in streams]
        rows = original(self, streams, sequences, outputs)
        for start, one in zip(starts, rows, strict=True):
            if self.info["batch"]["mode"] == mode and start and start % CHUNK == residue and len(one):
                one[-1] = one[-1] + np.float32(error) if error else np.nextafter(one[-1], np.float32(np.inf))
        return rows

    return faulty


class TestBoundaries:
    def test_passes(self, shared_bundle: Path, checkpoint: Path) -> None:
        result = invoke("verify", shared_bundle, "--boundaries", "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert report["passed"] is True and report["streams_per_call"] == 64
        assert report["periods"] == {"4": [1, 2, 3, 4, 8, 15], "8": [1, 2, 3, 4, 7]}
        assert {3, 4, 5, 31, 32, 33, 59, 60, 61} <= set(report["boundaries"])
        assert set(report["operations"]) == set(OPERATIONS)
        for name, one in report["operations"].items():
            assert one["passed"] and one["checks"] == len(report["boundaries"]) + 3  # the start of each walk
            assert one["max_abs_error"] <= (report["tolerance"] if name in ("cut", "batch_fast") else 0)
        args = ("verify", shared_bundle, "--boundaries", "--tokens", 8, "--against", checkpoint, "--details")
        result = invoke(*args)
        assert result.code == 0 and "period 8 was not reached" in result.err
        assert result.out.splitlines()[0].endswith("passed; 3 boundaries of the periods 4")

    @pytest.mark.parametrize(
        ("operation", "target", "residue", "fault"),
        [
            ("cut", "Stream.feed", 0, wrong_cut),
            ("fork", "Stream.fork", 3, frozen_at),
            ("mark", "Stream.rewind", 0, frozen_at),
            ("save", "Session.restore", 1, frozen_at),
            ("batch_exact", "Session.feed_batch", 0, lambda *args: wrong_batch(args[0], "exact", 0.0, args[1])),
            ("batch_fast", "Session.feed_batch", 3, lambda *args: wrong_batch(args[0], "fast", 3e-4, args[1])),
        ],
    )
    def test_finds_a_fault_at_one_boundary(
        self,
        shared_bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
        operation: str,
        target: str,
        residue: int,
        fault: Callable[[int, Wrapped], Wrapped],
    ) -> None:
        owner, method = target.split(".")
        kind = getattr(rt, owner)
        monkeypatch.setattr(kind, method, fault(residue, getattr(kind, method)))
        result = invoke("verify", shared_bundle, "--boundaries", "--json")
        result.check_failure(3, "differ at a boundary", "TITANS-E0912")
        report = result.json()
        found = report["operations"][operation]["faults"]
        assert not report["passed"] and found
        assert {one["boundary"] % CHUNK for one in found} == {residue}
        # Batches do not make the wrong feeds, and so differ from the lone stream too.
        others = {"batch_exact", "batch_fast"} if operation == "cut" else set()
        assert {name for name, one in report["operations"].items() if not one["passed"]} == {operation, *others}

    def test_lists_faults_on_request(self, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rt.Stream, "unmark", lambda stream, position: stream.reset())
        result = invoke("verify", shared_bundle, "--boundaries", "--details", "--tokens", 20)
        result.check_failure(3, "mark at position 3 (1 x 4 - 1)")
        assert "FAILED, 12 faults" in result.out.splitlines()[0]
        assert "position 0 in place of 3" in result.out
        invoke("verify", shared_bundle, "--boundaries", "--polygraphy").check_failure(2, "E0102")
        invoke("verify", shared_bundle, "--details").check_failure(2, "E0103")

    def test_multiples(self) -> None:
        assert multiples(64, 1024) == [1, 2, 3, 4, 8, 15]
        assert multiples(4, 8) == [1] and multiples(8, 8) == [] and multiples(8, 10) == [1]


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
