"""The layer benchmark: its costs, its reference, its baselines, its check, and the page that it fills."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracles import titans_stream
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs, layer, limits, long_stream, plot, table, text
from benchmarks.baselines import BASELINES, make
from benchmarks.case import KINDS, Case, rows
from benchmarks.reference import TOLERANCE, errors, recurrence
from titans_export.errors import MachineError
from titans_export.model.memory import Coefficients, Gates, MemorySpec, State, chunk_update, read
from titans_export.model.memory import recurrence as our_recurrence

# In the benchmark's process these live in other ones.
SAME_MATHEMATICS = [name for name in BASELINES if name not in ("torch_compile", "titans_pytorch")]
LIMITS = {"sgemm_gflops": 100.0, "bandwidth_gb_s": {}, "batched_gflops": {}, "sgemm_gflops_by_library": {}}


def _case(kind: str, widths: tuple[int, ...], tokens: int = 16) -> Case:
    return Case(f"test-{kind}", kind, widths, streams=2, heads=3, chunk=4, tokens=tokens, threads=1)


CASES = [_case(kind, widths) for kind in KINDS for widths in ((6, 6), (6, 10, 6))]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{len(case.widths) - 1}")


class TestCosts:
    @pytest.mark.parametrize(
        ("widths", "kflop"), [((64, 64), 57), ((128, 128), 197), ((64, 256, 64), 442), ((128, 512, 128), 1610)]
    )
    def test_operations_are_those_of_the_design(self, widths: tuple[int, ...], kflop: float) -> None:
        assert costs.update_flop(widths, 64) / 1e3 == pytest.approx(kflop, rel=0.01)

    # The design's table of bytes holds for chunks of 32 tokens.
    @pytest.mark.parametrize(
        ("widths", "kib"), [((64, 64), 42), ((128, 128), 152), ((64, 256, 64), 313), ((128, 512, 128), 1170)]
    )
    def test_bytes_are_those_of_the_design(self, widths: tuple[int, ...], kib: float) -> None:
        assert costs.decode_bytes(widths, 32) / 1024 == pytest.approx(kib, abs=0.6)

    @pytest.mark.parametrize("widths", [(64, 64), (8, 16, 8), (6, 10, 9, 6)])
    def test_operations_counted_one_by_one(self, widths: tuple[int, ...]) -> None:
        chunk = 8
        spec = MemorySpec(widths, chunk_size=chunk)
        state = State([torch.randn(i, o) for i, o in spec.shapes], [torch.randn(i, o) for i, o in spec.shapes])
        tokens = [torch.randn(chunk, widths[0]) for _ in range(3)]
        square, row = torch.randn(chunk, chunk), torch.randn(chunk)
        with FlopCounterMode(display=False) as counter:
            chunk_update(spec, state, *tokens, Coefficients(square, square, row, row, row))
        assert counter.get_total_flops() == chunk * costs.update_flop(widths, chunk)
        with FlopCounterMode(display=False) as counter:
            read(spec, state.w, tokens[0])
        assert counter.get_total_flops() == chunk * costs.read_flop(widths)

    @pytest.mark.parametrize("widths", [(64, 64), (6, 10, 9, 6)])
    def test_bytes_counted_one_by_one(self, widths: tuple[int, ...]) -> None:
        chunk, moved = 8, 0
        shapes = MemorySpec(widths).shapes
        state = sum(2 * 4 * i * o for i, o in shapes)
        for fill in range(chunk):
            moved += state
            moved += sum(4 * (i + o) for i, o in shapes) * (fill + 1)
        moved += 2 * state
        assert costs.decode_bytes(widths, chunk) == pytest.approx(moved / chunk)
        assert costs.live_decode_bytes(widths) == 2 * state
        assert costs.decode_working_set(widths, chunk) == state + chunk * costs.row_bytes(widths)


class TestReference:
    @pytest.mark.parametrize("widths", [(6, 6), (6, 10, 6)])
    def test_is_autograds_answer(self, widths: tuple[int, ...]) -> None:
        case = _case("mac", widths)
        right, data = recurrence(case), case.data
        for stream in range(case.streams):
            for head in range(case.heads):
                at = (stream, head)
                operands = (torch.from_numpy(value[at]).double() for value in data.operands.values())
                weights = [torch.from_numpy(value[at]).double() for value in data.weights]
                y, w, s, _ = titans_stream(case.spec, weights, *operands)
                found = {"y": y, **{f"W{i}": x for i, x in enumerate(w)}, **{f"S{i}": x for i, x in enumerate(s)}}
                for name, value in found.items():
                    np.testing.assert_allclose(right[name][at], value.numpy(), rtol=1e-10, atol=1e-12)

    def test_is_the_projects_answer(self) -> None:
        case = _case("decode", (6, 10, 6))
        data = {name: torch.from_numpy(value).double() for name, value in case.data.operands.items()}
        weights = [torch.from_numpy(value).double() for value in case.data.weights]
        gates = Gates(data["step_size"], data["momentum"], data["forget_gate"])
        state = State(weights, [torch.zeros_like(w) for w in weights])
        y, state = our_recurrence(case.spec, state, data["q"], data["k"], data["v"], gates)
        ours = {"y": y.numpy(), **{f"W{i}": x.numpy() for i, x in enumerate(state.w)}}
        right = recurrence(case)
        assert max(errors(ours, {name: right[name] for name in ours}).values()) < 1e-12

    def test_errors(self) -> None:
        right = {"y": np.array([1.0, -2.0]), "W0": np.array([4.0])}
        assert errors({"y": np.array([1.0, -2.1]), "W0": np.array([4.0])}, right) == pytest.approx({"y": 0.05, "W0": 0})
        assert errors({"y": np.array([np.nan, 0.0])}, right) == {"y": float("inf"), "W0": float("inf")}
        assert errors({"y": np.array([1.0]), "W0": np.array([4.0])}, right)["y"] == float("inf")

    def test_many_tokens_leave_the_memory_steady(self) -> None:
        long = dataclasses.replace(_case("prefill", (6, 10, 6)), tokens=4000)
        right = recurrence(long)
        start = max(float(np.abs(w).max()) for w in long.data.weights)
        assert all(np.isfinite(value).all() for value in right.values())
        assert max(float(np.abs(right[name]).max()) for name in ("W0", "W1")) < 2 * start


class TestBaselines:
    @pytest.mark.parametrize("name", SAME_MATHEMATICS)
    @cases
    def test_are_right_and_go_on(self, name: str, case: Case) -> None:
        baseline = make(name, case)
        try:
            baseline.prepare()
        except MachineError as error:
            pytest.skip(str(error))
        right = recurrence(case)
        for _ in range(2):
            assert max(errors(baseline.answer(), right).values()) <= TOLERANCE
            turn = baseline.run_passes(2)
            calls = {"mac": 4, "decode": 16}.get(case.kind)
            assert len(turn) == 2
            assert all(calls in (None, len(one)) and all(taken > 0 for taken in one) for one in turn)
        assert baseline.state_bytes() > 0

    @pytest.mark.long
    @cases
    def test_torch_compile_is_right(self, case: Case) -> None:
        baseline = make("torch_compile", case)
        notes = baseline.prepare()
        assert notes["form"] in notes["tokens_per_second_tried"]
        right = recurrence(case)
        assert max(errors(baseline.answer(), right).values()) <= TOLERANCE
        baseline.run_passes(1)
        assert max(errors(baseline.answer(), right).values()) <= TOLERANCE

    def test_titans_pytorch_runs(self) -> None:
        pytest.importorskip("titans_pytorch", reason="optional: pip install '.[bench]'")
        for kind in ("prefill", "decode"):
            baseline = make("titans_pytorch", _case(kind, (6, 12, 6)))
            baseline.prepare()
            assert baseline.about()[1] is False
            assert len(baseline.run_passes(1)) == 1


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(layer.main, [str(argument) for argument in arguments])


SMALL = ("--head-dim", 6, "--hidden", 10, "--heads", 2, "--chunk", 4, "--tokens", 8, "--decode-tokens", 8)


class TestProgram:
    @pytest.fixture(autouse=True)
    def known_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(cases: list[Case], threads: int) -> dict[str, Any]:
            bandwidth = {str(case.decode_working_set): {"read": 10.0, "copy": 10.0} for case in cases}
            return {**LIMITS, "bandwidth_gb_s": bandwidth}

        monkeypatch.setattr(limits, "measure", measure)

    def test_a_wrong_baseline_has_no_speed(self, tmp_path: Path) -> None:
        output = tmp_path / "layer.json"
        baselines = ("--baseline", "torch-eager", "--baseline", "bench_doubles")
        chosen = ("--row", "linear-decode", "--row", "mlp-prefill", "--rounds", 2, "--threads", 1)
        result = _run(*SMALL, *chosen, *baselines, "-o", output)
        assert result.exit_code == 2, "a name without dots has to be known"
        baselines = ("--baseline", "torch-eager", "--baseline", "tests.support.bench_doubles")
        result = _run(*SMALL, *chosen, *baselines, "-o", output)
        assert result.exit_code == 3, result.output
        report = json.loads(output.read_text())
        assert report["passed"] is False
        assert [row["name"] for row in report["rows"]] == ["mlp-prefill", "linear-decode"]
        for row in report["rows"]:
            right, wrong = row["baselines"]
            assert right["passed"] is True
            assert right["speed"]["rounds"] == 2
            assert right["share_of_limit"] > 0
            assert wrong["passed"] is False
            assert wrong["errors"]["y"] > TOLERANCE
            assert "speed" not in wrong
            assert row["ratios"] == {}
        assert "**incorrect**" in result.output
        # The same file fills a page.
        page = "".join(f"{table.MARKERS[0].format(name)}\nold\n{table.MARKERS[1]}\n" for name in table.blocks(tmp_path))
        filled = table.fill(page, table.blocks(tmp_path))
        assert "old" not in filled
        assert "linear-decode" in filled
        assert table.fill(filled, table.blocks(tmp_path)) == filled

    def test_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="optional: pip install '.[bench]'")
        output = tmp_path / "layer.json"
        baselines = ("--baseline", "torch-eager", "--baseline", "onnxruntime-standard")
        result = _run(*SMALL, "--row", "linear-decode", "--rounds", 1, "--threads", 1, *baselines, "-o", output)
        assert result.exit_code == 0, result.output
        report = json.loads(output.read_text())
        pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
        for picture in pictures:
            plot.draw(report, picture)
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
        assert b"<svg" in pictures[0].read_bytes()


def test_rows_cover_every_kind_and_memory() -> None:
    found = rows(64, 256, 1, 8, 64, 4096, 512, 2)
    assert {(case.kind, case.widths) for case in found} == {
        (kind, widths) for kind in KINDS for widths in ((64, 64), (64, 256, 64))
    }
    assert all(case.tokens == (512 if case.kind == "decode" else 4096) for case in found)


def test_the_share_of_a_limit() -> None:
    prefill, decode = _case("prefill", (6, 6)), _case("decode", (6, 6))
    limit = {**LIMITS, "bandwidth_gb_s": {str(decode.decode_working_set): {"read": 2.0}}}
    # Two streams: 1000 tokens/s together are 500 steps of both.
    assert layer.share(prefill, 1000, limit) == pytest.approx(500 * 6 * costs.update_flop((6, 6), 4) / 1e11)
    assert layer.share(decode, 1000, limit) == pytest.approx(500 * 6 * costs.decode_bytes((6, 6), 4) / 2e9)


def test_the_best_of_two_measurements() -> None:
    a = {"x": 1.0, "by": {"p": 3, "q": 1}}
    assert limits.best(a, {"x": 2.0, "by": {"p": 2, "q": 5}}) == {"x": 2.0, "by": {"p": 3, "q": 5}}


def test_the_page_holds_the_results() -> None:
    page = table.DOCUMENT.read_text(encoding="utf-8")
    assert table.fill(page, table.blocks()) == page, "run python -m benchmarks.table"


class TestLongStream:
    def test_text_is_whole_and_in_order(self, tmp_path: Path) -> None:
        contents = [b"abc", b"", b"defghij", b"k"]
        files = [tmp_path / str(i) for i in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        assert list(text.pieces(files, 4, 9)) == [b"abcd", b"efgh", b"i"]
        assert list(text.pieces(files, 4, 100)) == [b"abcd", b"efgh", b"ijk"]
        assert list(text.pieces(files, 4, 8)) == [b"abcd", b"efgh"]

    def test_there_is_enough_text_everywhere(self) -> None:
        assert len(text.standard_library(2_110_000)) == 2_110_000

    @pytest.mark.parametrize(
        ("change", "failures"),
        [
            ({}, 0),
            ({"rss_growth_bytes": 1 << 20}, 1),
            ({"speed_ratio": 0.94}, 1),
            ({"speed_ratio": 1.06, "bits_per_byte": float("nan")}, 2),
        ],
    )
    def test_what_has_to_hold(self, change: dict[str, Any], failures: int) -> None:
        good = {"rss_growth_bytes": 4096, "speed_ratio": 0.99, "bits_per_byte": 2.0}
        assert len(long_stream.judge({**good, **change})) == failures
