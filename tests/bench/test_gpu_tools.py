"""What is computed, timed and rendered around a GPU, on a machine without one. Programs of fake_gpu.py stand for the
GPU's: what is timed with them says nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
import torch

from benchmarks import gpu_device, gpu_device_check, gpu_matrix, gpu_parts, gpu_time
from benchmarks.case import Case
from benchmarks.gpu_cases import TOLERANCES, Row, read_answer, rows, sanitizer_rows, small, write_case
from benchmarks.gpu_torch import FORMS, precision
from benchmarks.reference import errors, recurrence
from titans_export.bench.statistics import summarise
from titans_export.errors import MachineError, MismatchError

pytest_plugins = ["export_fixtures", "gpu_fixtures"]
needs_kernel = pytest.mark.skipif(
    not fake_gpu.CPU_PROGRAM.is_file(), reason="no program around the CPU kernel: make kernels"
)
ROOT = Path(__file__).resolve().parents[2]
ONE_LINE = re.compile(r"\[\w+\] .+[^.]\. Fix: .+ \(TITANS-E\d{4}\)")


def case(kind: str, widths: tuple[int, ...] = (16, 24, 16)) -> Case:
    return Case("case", kind, widths, 2, 2, 8, 24, threads=0)


# ---- cases and baselines ----


def test_rows_have_names_of_their_own_and_say_what_they_are_held_against() -> None:
    found = rows()
    assert len({row.name for row in found}) == len(found)
    assert {row.bound_by for row in found} == {"matrix", "copy"}
    head, many = found[0], found[1]
    assert head.case.streams * head.case.heads == 264
    # W and S of 2 x 16384 float32 are read once, and read and written once more a chunk; 128 x 640 of rows on average.
    per_head = 64 * (4 * 2 * 32768 * (1 + 2 / 64) + 4 * 640 * 65 / 2)
    assert many.bytes_per_pass == pytest.approx(1056 * per_head)
    stored = Row(many.case, "bfloat16", "bfloat16", "copy")
    assert stored.bytes_per_pass == pytest.approx(1056 * (per_head - 64 * 4 * 32768 * (1 + 2 / 64)))


@pytest.mark.parametrize("widths", [(16, 16), (16, 24, 16), (8, 12, 10, 8)], ids=str)
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_every_form_of_pytorch_is_the_recurrence(kind: str, widths: tuple[int, ...]) -> None:
    """In float64, where nothing but the mathematics can differ."""
    right = recurrence(case(kind, widths))
    for form in FORMS[kind]:
        with torch.inference_mode():
            made = form(case(kind, widths), "cpu", None, torch.float64)
            for _ in range(2):  # `answer` begins anew
                assert max(errors(made.answer(), right).values()) < 1e-12, form.__name__


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_lower_precisions_are_within_what_they_are_allowed(kind: str) -> None:
    right = recurrence(case(kind))
    found = {}
    for name in ("float32", "bfloat16"):
        with torch.inference_mode(), precision(name, "cpu"):
            found[name] = max(errors(FORMS[kind][0](case(kind), "cpu", None).answer(), right).values())
        assert found[name] < TOLERANCES[name]
    assert found["bfloat16"] > 100 * found["float32"], "bfloat16 was not used"


@needs_kernel
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_case_goes_to_the_program_and_its_answer_comes_back(kind: str, tmp_path: Path) -> None:
    for row in (Row(case(kind), "float32", "float32", "copy"), Row(case(kind), "float32", "bfloat16", "copy")):
        write_case(row, tmp_path / "case")
        subprocess.run([fake_gpu.CPU_PROGRAM, tmp_path / "case", tmp_path / "out"], check=True)
        answer, right = read_answer(row, tmp_path / "out"), recurrence(row.case)
        wrong = errors(answer, {name: right[name] for name in answer})
        assert ("W0" in answer) == (row.memory_dtype == "float32")
        assert max(wrong.values()) < TOLERANCES[row.memory_dtype]


def test_small_rows_are_the_same_memory() -> None:
    for row in rows():
        assert small(row).case.widths == row.case.widths
        assert small(row).case.tokens == 3 * row.case.chunk
    assert {row.values for row in sanitizer_rows()} == {"float32", "bfloat16"}


# ---- timing ----


def _baseline(name: str, us: float, passed: bool | None = True) -> dict[str, Any]:
    return {"name": name, "passed": passed, "us_per_pass": us, "us_per_chunk": us / 4, "tflops": 100.0, "gb_s": 2000.0}


def test_the_verdict_takes_the_fastest_that_is_right() -> None:
    row, bound = rows()[0], {"matrix_bfloat16_tflops": 400.0, "copy_gb_s": 2500.0}
    theirs = [
        _baseline("torch eager", 900),
        _baseline("torch.compile a", 10, passed=False),
        {"name": "torch.compile b", "passed": None, "unavailable": "no"},
        _baseline("torch.compile c", 300),
    ]
    found = gpu_time.verdict(row, [_baseline("kernel", 120), _baseline("kernel, graph", 100)], theirs, bound)
    assert found["share_of_limit"] == 0.25
    assert found["reached"] is False
    assert found["times_torch"] == {"compile": 3.0, "eager": 9.0, "any": 3.0}
    decode = gpu_time.verdict(rows()[1], [_baseline("kernel", 100)], [], bound)
    assert decode["share_of_limit"] == 0.8
    assert decode["reached"] is True
    one = gpu_time.verdict(rows()[2], [_baseline("kernel", 200)], [], bound)
    assert one["reached"] is False, "50 microseconds a chunk, 40 are aimed at"
    nothing = gpu_time.verdict(row, [_baseline("kernel", 1, passed=False)], theirs, bound)
    assert nothing["share_of_limit"] is None


def test_units_follow_from_the_time_of_a_pass() -> None:
    row = rows()[0]
    speed = summarise([[[2_000_000], [2_000_000]]], row.case.streams * row.case.tokens)
    found = gpu_time.in_units(row, speed)
    assert found["us_per_pass"] == pytest.approx(2000)
    assert found["us_per_chunk"] == pytest.approx(2000 / 32)
    assert found["tflops"] == pytest.approx(row.flop_per_pass / 2e-3 / 1e12)
    assert found["gb_s"] == pytest.approx(row.bytes_per_pass / 2e-3 / 1e9)


@needs_kernel
def test_a_kernel_is_checked_and_then_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(case("decode"), "bfloat16", "float32", "copy")
    program = tmp_path / "bin" / "neural_memory_run_cuda"
    fake_gpu.make_machine(tmp_path, program)
    subprocess.run([tmp_path / "cmake"], check=True)
    right = recurrence(small(row).case)
    for entry in gpu_time.time_kernel(row, program, right):
        assert entry["passed"]
        assert entry["speed"]["passes"] == gpu_time.PASSES
        assert entry["us_per_token_of_all_streams"] > 0
        assert entry["placement"] == "blocks 1"
    monkeypatch.setenv("FAKE_WRONG", "1")
    for entry in gpu_time.time_kernel(row, program, right):
        assert entry["passed"] is False
        assert "speed" not in entry, "a wrong answer has no speed"


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_row_has_all_baselines_checked_and_timed(kind: str, gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a row on the CPU, with a clock of the CPU's and no CUDA graphs."""
    from benchmarks.gpu_torch import Way

    def clock(work: Callable[[], Any], passes: int) -> list[int]:
        work()
        return [1000] * passes

    ways = (
        Way("torch eager", None, False),
        Way("torch.compile", "default", True),
        Way("broken", "no such mode", False),
    )
    monkeypatch.setattr(gpu_time, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_time, "WAYS", ways)
    monkeypatch.setattr(gpu_time, "time_events", clock)
    monkeypatch.setattr(gpu_time, "captured", lambda work: work)
    subprocess.run([gpu / "tools" / "cmake"], check=True)
    row = Row(case(kind), "float32", "float32", "copy", reach_share=0.8)
    limits = {"copy_gb_s": 1.0, "matrix_float32_tflops": 1.0}
    found = gpu_time.time_row(row, gpu_parts.PROGRAM, limits, until=float("inf"))
    kernels = [entry for entry in found["baselines"] if "kernel" in entry["name"]]
    assert len(kernels) == 2
    others = [entry for entry in found["baselines"] if "torch" in entry["name"]]
    assert len(others) == 2 * len(FORMS[kind]) * len(gpu_time.products_of(row))
    for entry in kernels + others:
        assert entry["passed"], entry
        assert entry["us_per_pass"] > 0
    broken = [entry for entry in found["baselines"] if "broken" in entry["name"]]
    assert broken
    assert all("no such mode" in entry["unavailable"] for entry in broken)
    assert set(found["times_torch"]) == {"compile", "eager", "any"}
    assert found["reached"] is (found["share_of_limit"] >= 0.8)
    json.dumps(found)
    late = gpu_time.time_torch(row, recurrence(small(row).case), until=0)
    assert "no time was left" in str(next(entry for entry in late if "compile" in entry["name"])["unavailable"])


# ---- bundles on devices ----


def test_a_bundle_is_run_to_its_golden_logits_and_beyond(bundles: dict[str, Path]) -> None:
    found = gpu_device.run_bundle(bundles["lmm"], "onnxruntime", 300, device="cpu")
    assert found["golden_max_abs_error"] <= found["golden_tolerance"]
    assert found["stream_max_abs_error"] == 0, "the same library on both sides"
    assert found["stream_tokens"] == 300
    assert found["decode_p99_us"] >= found["decode_p50_us"] > 0
    assert found["prefill_tokens_per_s"] > 0


def test_wrong_logits_and_missing_engines_are_told(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="titans-export build"):
        gpu_device.run_bundle(bundles["lmm"], "tensorrt", 0, device="cpu")
    monkeypatch.setattr(gpu_device, "allowed", lambda *rest: 0.0)
    with pytest.raises(MismatchError, match="golden"):
        gpu_device.run_bundle(bundles["lmm"], "onnxruntime", 0, device="cpu")


def test_engines_are_built_with_a_command_that_exists(tmp_path: Path) -> None:
    from titans_export.cli import main as program

    chosen = gpu_device_check.parse(["x.titans", "--target", "orin-agx", "-o", "x.json", "--precision", "fp16"])
    for alias in gpu_device_check.ALIASES:
        _, _, _, command, *words = gpu_device_check.build_command(chosen, alias, tmp_path / "plugin.so")
        parsed = program.commands[command].make_context(command, list(words))
        assert parsed.params["alias"] == alias
        assert parsed.params["name"] == f"orin-agx-fp16-{alias}"


# ---- the matrix ----

COMPILED = {column: {"sm": [87], "how": f"how of {column}"} for column in gpu_matrix.COLUMNS}


def _cells(results: list[dict[str, Any]], target: str) -> list[str]:
    [line] = [line for line in gpu_matrix.render(results, COMPILED).splitlines() if line.startswith(f"| `{target}`")]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_cells_say_what_was_done() -> None:
    assert _cells([], "orin-agx") == ["compiled only"] * 4
    assert _cells([], "h100") == ["not tried"] * 4
    check = {
        "check": "gpu_check",
        "device": {"name": "NVIDIA H100 80GB HBM3", "sm": 90},
        "parts": {
            "test": {"status": "done", "date": "2026-12-01"},
            "plugin": {"status": "not run", "date": "2026-12-01"},
            "engines": {"status": "failed", "date": "2026-12-01"},
        },
    }
    assert _cells([check], "h100") == ["run on NVIDIA H100 80GB HBM3, 2026-12-01", *["not tried"] * 3]
    assert _cells([check], "h200") == ["not tried"] * 4, "the same chip, another device"
    orin = {
        "check": "device_check",
        "target": "orin-agx",
        "device": {"name": "Orin", "sm": 87},
        "parts": {part: {"status": "done", "date": "2026-12-02"} for part in ("engines", "run")},
    }
    assert _cells([check, orin], "orin-agx") == ["run on Orin, 2026-12-02"] * 4
    engine = {
        "check": "engine",
        "target": "cpu",
        "date": "2026-12-03",
        "machine": {"processor": "a CPU"},
        "verify": {"passed": True},
    }
    assert _cells([engine], "cpu") == ["not tried", "-", "run on a CPU, 2026-12-03", "not tried"]
    assert _cells([{**engine, "verify": {"passed": False}}], "cpu")[2] == "not tried"


@pytest.mark.parametrize(
    ("name", "sm", "target"),
    [
        ("NVIDIA GeForce RTX 4090", 89, "rtx-40"),
        ("NVIDIA L4", 89, "l4"),
        ("NVIDIA L40S", 89, "l40s"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA B200", 100, "b200"),
        ("NVIDIA GeForce RTX 5080", 120, "rtx-50"),
        ("NVIDIA RTX 6000 Ada Generation", 89, None),
    ],
)
def test_devices_are_known_by_their_names(name: str, sm: int, target: str | None) -> None:
    found = gpu_matrix.target_of({"name": name, "sm": sm})
    assert (found.name if found else None) == target


def test_the_page_is_in_step_with_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_matrix.main(["--check"]) == 0, capsys.readouterr().out
