"""Workers, interleaved measurement and statistics; and the command `bench`. Speeds are never asserted."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import environment, invoke, spawn

from benchmarks import table
from benchmarks.report import provenance, write
from titans_export.bench import KINDS, comparison
from titans_export.bench.interleaved import interleave
from titans_export.bench.statistics import Speed, summarise
from titans_export.bench.worker import Worker, WorkerError

pytest_plugins = ["cli_fixtures"]
SHORT = ("--tokens", 8, "--decode-tokens", 4, "--rounds", 2, "--threads", 1)
EVERYTHING = {
    "bundle", "against", "device", "passed", "tolerance", "ratios", "prefill_tokens", "decode_tokens", "rounds",
    "threads", "baselines", "machine", "packages", "others_busy",
}  # fmt: skip
OF_A_BASELINE = {
    "name", "what", "unavailable", "passed", "max_abs_error", "first_bad_position", *KINDS, "state_bytes",
    "peak_rss_bytes", "setup_s", "notes",
}  # fmt: skip


class TestStatistics:
    def test_known_data(self) -> None:
        # Two rounds of two passes of two calls, 10 tokens a pass: 4, 2, 1 and 1 microseconds a pass.
        turns = [[[1000, 3000], [1000, 1000]], [[500, 500], [600, 400]]]
        speed = summarise(turns, 10)
        rates = [2.5e6, 5e6, 1e7, 1e7]
        assert speed.tokens_per_second == pytest.approx(np.median(rates))
        assert speed.slowest_round == pytest.approx(10 / 3e-6)
        assert speed.fastest_round == pytest.approx(1e7)
        assert (speed.quartile_1, speed.quartile_3) == pytest.approx(tuple(np.percentile(rates, (25, 75))))
        calls = [1, 3, 1, 1, 0.5, 0.5, 0.6, 0.4]
        assert (speed.p50_us, speed.p90_us, speed.p99_us) == pytest.approx(tuple(np.percentile(calls, (50, 90, 99))))
        assert (speed.rounds, speed.passes, speed.calls) == (2, 4, 8)

    def test_a_rare_slow_call_counts_in_the_rate_but_not_in_the_median_call(self) -> None:
        speed = summarise([[[10] * 63 + [10_000]]], 64)
        assert speed.p50_us == pytest.approx(0.01)
        assert speed.tokens_per_second == pytest.approx(64e9 / 10_630)


def test_rounds_are_interleaved_and_start_with_the_next_baseline() -> None:
    order: list[str] = []

    def taker(name: str) -> Any:
        return lambda: order.append(name) or [[len(order)]]

    turns = interleave({name: taker(name) for name in "abc"}, 3, settle_s=0)
    assert "".join(order) == "abcbcacab"
    assert turns == {"a": [[[1]], [[6]], [[8]]], "b": [[[2]], [[4]], [[9]]], "c": [[[3]], [[5]], [[7]]]}
    assert interleave({}, 3, settle_s=0) == {}


class TestWorker:
    def test_answers(self) -> None:
        with Worker("bench_doubles:Box", 40, threads=3) as worker:
            assert worker.call("add", 2) == 42
            assert worker.call("environment", "OMP_NUM_THREADS") == "3"

    def test_says_what_went_wrong_and_goes_on(self) -> None:
        with Worker("bench_doubles:Box", 1, threads=1) as worker:
            with pytest.raises(WorkerError, match=r"^RuntimeError: broken in two lines$"):
                worker.call("fail")
            assert worker.call("add", 1) == 2

    def test_that_cannot_begin(self) -> None:
        with pytest.raises(WorkerError, match="ValueError: negative"):
            Worker("bench_doubles:Box", -1, threads=1)
        with pytest.raises(WorkerError, match="No module named 'nothing'"):
            Worker("nothing:Box", threads=1)

    def test_that_crashes(self) -> None:
        with Worker("bench_doubles:Box", 1, threads=1) as worker:
            with pytest.raises(WorkerError, match="it ended with 7: last words"):
                worker.call("crash")
            with pytest.raises(WorkerError):
                worker.call("add", 1)


class TestCommand:
    def test_json(self, shared_bundle: Path, tmp_path: Path) -> None:
        output = tmp_path / "bench.json"
        result = invoke("bench", shared_bundle, *SHORT, "--output", output, "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert json.loads(output.read_text()) == report
        assert set(report) == EVERYTHING
        assert report["passed"] is True
        # Rounded up to whole calls and chunks.
        assert (report["prefill_tokens"], report["decode_tokens"], report["rounds"]) == (8, 4, 2)
        names = [entry["name"] for entry in report["baselines"]]
        assert names == ["memory-kernel", "standard-operators"]
        for entry in report["baselines"]:
            assert set(entry) == OF_A_BASELINE
            if entry["unavailable"]:
                continue
            assert entry["passed"] is True
            assert entry["max_abs_error"] <= report["tolerance"]
            assert entry["state_bytes"] > 0
            assert entry["peak_rss_bytes"] > 1 << 20
            for kind in KINDS:
                assert set(entry[kind]) == {field.name for field in fields(Speed)}
                assert entry[kind]["rounds"] == 2
        if not report["baselines"][0]["unavailable"]:
            assert set(report["ratios"]) == set(KINDS)
            assert set(report["ratios"]["decode"]) == {"standard-operators"}

    def test_fills_the_page(self, shared_bundle: Path, tmp_path: Path) -> None:
        report = invoke("bench", shared_bundle, *SHORT, "--json").json()
        result = {"benchmark": "model", "name": "tiny", **report, **provenance()}
        write(tmp_path / "cpu-tiny.json", result)
        block = table.blocks(tmp_path)["models"]
        assert "| tiny | decode | standard-operators |" in block or not report["ratios"]
        assert result["machine"]["processor"] in block

    def test_for_people(self, shared_bundle: Path) -> None:
        result = invoke("bench", shared_bundle, *SHORT, "--memory-kernel", "off")
        assert result.code == 0, result.err
        assert "standard-operators" in result.out
        assert "memory-kernel" not in result.out

    def test_a_wrong_baseline_has_no_speed(
        self, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = comparison.baselines

        def with_a_wrong_one(*args: Any) -> list[comparison.Baseline]:
            right = real(*args)[-1]
            return [right, comparison.Baseline("wrong", "off", "bench_doubles:WrongModel", right.args)]

        monkeypatch.setattr(comparison, "baselines", with_a_wrong_one)
        output = tmp_path / "bench.json"
        result = invoke("bench", shared_bundle, *SHORT, "--output", output, "--json")
        result.check_failure(3, "wrong", "position 10")
        report = result.json()
        assert json.loads(output.read_text()) == report
        right, wrong = report["baselines"]
        assert (report["passed"], right["passed"], wrong["passed"]) == (False, True, False)
        assert wrong["first_bad_position"] == 10
        assert report["ratios"] == {}
        assert all(entry[kind] is None for entry in (right, wrong) for kind in KINDS)

    def test_a_baseline_that_cannot_take_part_is_told(
        self, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = comparison.baselines
        missing = comparison.Baseline("absent", "not there", "nothing:Nobody", ())
        monkeypatch.setattr(comparison, "baselines", lambda *args: [missing, real(*args)[-1]])
        result = invoke("bench", shared_bundle, *SHORT, "--json")
        assert result.code == 0, result.err
        absent, present = result.json()["baselines"]
        assert "No module named 'nothing'" in absent["unavailable"]
        assert absent["passed"] is None
        assert present["decode"]["tokens_per_second"] > 0

    @pytest.mark.slow
    def test_against_a_checkpoint(self, shared_bundle: Path, checkpoint: Path) -> None:
        result = invoke("bench", shared_bundle, "--against", checkpoint, *SHORT, "--json")
        assert result.code == 0, result.err
        entries = {entry["name"]: entry for entry in result.json()["baselines"]}
        assert set(entries) == {"memory-kernel", "standard-operators", "pytorch-eager", "pytorch-compile"}
        assert entries["pytorch-eager"]["passed"] is True
        compiled = entries["pytorch-compile"]
        assert compiled["passed"] is True
        assert compiled["notes"]["chunk_call"].startswith("compiled in")
        assert compiled["notes"]["decode_call"].startswith("compiled in")

    def test_another_checkpoint_is_wrong(self, shared_bundle: Path, tiny_checkpoint: Path) -> None:
        result = invoke("bench", shared_bundle, "--against", tiny_checkpoint, *SHORT)
        result.check_failure(3, "pytorch-eager")

    def test_usage(self, shared_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
        invoke("bench", shared_bundle, "--against", checkpoint, "--device", "cuda").check_failure(2, "--device is cuda")
        invoke("bench", tmp_path / "none.titans").check_failure(1)
        invoke("bench", shared_bundle, "--rounds", 0).check_failure(2)
        missing = tmp_path / "no" / "file.json"
        invoke("bench", shared_bundle, *SHORT, "--output", missing).check_failure(1, "create the folder")

    def test_needs_no_torch(self, shared_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
        path = f"{tmp_path}:{environment()['PYTHONPATH']}"
        result = spawn("bench", shared_bundle, *SHORT, "--json", PYTHONPATH=path)
        assert result.code == 0, result.err
