"""tools/gpu_check and tools/device_check on a machine without a GPU: the flow, the one file, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
import torch

from benchmarks import gpu_check, gpu_device_check, gpu_machine, gpu_parts, gpu_time
from benchmarks.gpu_cases import Row, rows, sanitizer_rows
from benchmarks.gpu_report import Report
from titans_export.errors import MachineError, OutputError, TitansError

pytest_plugins = ["gpu_fixtures"]
needs_kernel = pytest.mark.skipif(
    not fake_gpu.CPU_PROGRAM.is_file(), reason="no program around the CPU kernel: make kernels"
)
ROOT = Path(__file__).resolve().parents[2]
ONE_LINE = re.compile(r"\[\w+\] .+[^.]\. Fix: .+ \(TITANS-E\d{4}\)")

# ---- the machine ----


def test_what_nvidia_smi_says_is_read() -> None:
    gpu = gpu_machine.find_gpu(lambda command: fake_gpu.SMI + "\nanother GPU\n")
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"
    assert gpu["sm"] == 90
    assert gpu["compute_capability"] == "9.0"
    assert gpu["memory_mib"] == 81559


def test_a_machine_without_a_gpu_or_compiler_is_refused() -> None:
    def nothing(command: Sequence[str]) -> str:
        raise FileNotFoundError(command[0])

    for find in (lambda: gpu_machine.find_gpu(nothing), lambda: gpu_machine.find_gpu(lambda command: "")):
        with pytest.raises(MachineError, match="no NVIDIA GPU"):
            find()
    if not Path("/usr/local/cuda/bin/nvcc").is_file():
        with pytest.raises(MachineError, match="no CUDA compiler"):
            gpu_machine.find_toolkit(lambda name: None)


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("gpu_check", ["-o", "gpu.json"], "an NVIDIA GPU"),
        ("device_check", ["no.titans", "--target", "orin-agx", "-o", "device.json"], "TensorRT"),
    ],
)
def test_the_tools_say_what_is_missing_here(tool: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert ONE_LINE.fullmatch(done.stderr.strip()), done.stderr
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_device_check.main(["x.titans", "--target", "toaster", "-o", "x.json"]) == 2
    assert "toaster" in capsys.readouterr().err


# ---- the report ----

DESCRIPTION: dict[str, Any] = {"sources": "abc", "device": {"name": "GPU", "power_limit_w": 700.0}, "cuda": "13.0"}


def test_parts_add_up_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Report(path, "gpu_check", DESCRIPTION).save("build", "done", compile_s=1.23456789)
    later = Report(path, "gpu_check", DESCRIPTION)
    assert later.part("build")["compile_s"] == 1.2346
    later.save("time", "partial", rows=[{"name": "a"}])
    content = json.loads(path.read_text())
    assert content["parts"]["build"]["status"] == "done"
    assert content["parts"]["time"]["rows"] == [{"name": "a"}]
    assert content["device"]["power_limit_w"] == 700
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changed", [{"sources": "abd"}, {"cuda": "12.6"}, {"device": {"name": "other"}}])
def test_parts_of_other_sources_or_machines_are_not_mixed(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "gpu.json"
    Report(path, "gpu_check", DESCRIPTION).save("build", "done")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=f"has another {next(iter(changed))}"):
        Report(path, "gpu_check", DESCRIPTION | changed)
    with pytest.raises(OutputError, match="expected device_check, schema"):
        Report(path, "device_check", DESCRIPTION)
    path.write_text("{}")
    with pytest.raises(OutputError, match="is not a report"):
        Report(path, "gpu_check", DESCRIPTION)
    path.write_bytes(before)


def test_what_could_not_run_is_in_the_report_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    report = Report(path, "gpu_check", DESCRIPTION)
    report.save("time", "partial", rows=[1])
    for kind, status in ((MachineError, "not run"), (TitansError, "failed")):
        with pytest.raises(TitansError), report.running("time"):
            raise kind("E0908", "x", "a", "b")
        part = json.loads(path.read_text())["parts"]["time"]
        assert part["status"] == status
        assert part["reason"] == "[x] a. Fix: b (TITANS-E0908)"
        assert part["rows"] == [1], "rows that were measured are lost"


def test_the_hash_of_the_sources_follows_them(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    source = tmp_path / "plugins" / "kernel.cu"
    source.write_text("a")
    first = gpu_machine.hash_sources(tmp_path)
    (tmp_path / "plugins" / "notes.md").write_text("nothing that is compiled")
    assert gpu_machine.hash_sources(tmp_path) == first
    source.write_text("b")
    assert gpu_machine.hash_sources(tmp_path) != first


# ---- the flow ----


@needs_kernel
def test_the_parts_run_one_after_the_other(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gpu / "gpu.json"
    monkeypatch.setattr(gpu_parts, "sanitizer_rows", lambda: sanitizer_rows()[:2])
    assert gpu_check.main(["-o", str(path), "--part", "sanitize"]) == 4, "nothing is built"
    assert gpu_check.main(["-o", str(path), "--part", "build", "--jobs", "1"]) == 0
    assert "-DTITANS_CUDA_ARCHITECTURES=90a" in (gpu / "tools" / "cmake.log").read_text()
    assert gpu_check.main(["-o", str(path), "--part", "sanitize"]) == 0
    assert gpu_check.main(["-o", str(path), "--part", "plugin", "--part", "time"]) == 4
    content = json.loads(path.read_text())
    parts = content["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "build": "done", "sanitize": "done", "plugin": "not run", "time": "not run",
    }  # fmt: skip
    assert len(parts["sanitize"]["rows"]) == 2 * len(gpu_parts.TOOLS)
    assert "SUMMARY: 0 errors" in parts["sanitize"]["rows"][0]["summary"]
    assert "TensorRT's headers" in parts["plugin"]["reason"]
    assert content["device"]["sm"] == 90
    assert content["cuda"] == "13.0"
    assert content["uncommitted_changes"] in (True, False, None)
    monkeypatch.setenv("FAKE_SANITIZER", "racecheck")
    assert gpu_check.main(["-o", str(path), "--part", "sanitize"]) == 1
    assert "RACECHECK SUMMARY: 1 errors" in json.loads(path.read_text())["parts"]["sanitize"]["reason"]


@needs_kernel
@pytest.mark.slow
def test_the_table_of_tests_goes_to_the_program_that_was_built(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gpu / "gpu.json"
    monkeypatch.setattr(gpu_parts, "ON_GPU", "cuda-gpu and bfloat16_memory_dtype and linear-17")
    assert gpu_check.main(["-o", str(path), "--part", "test"]) == 4, "nothing is built"
    assert gpu_check.main(["-o", str(path), "--part", "build", "--part", "test"]) == 0
    part = json.loads(path.read_text())["parts"]["test"]
    assert part["passed"] > 0
    assert part["failed"] == part["skipped"] == 0
    monkeypatch.setenv("FAKE_WRONG", "1")
    assert gpu_check.main(["-o", str(path), "--part", "test"]) == 1
    assert "bfloat16_memory_dtype" in json.loads(path.read_text())["parts"]["test"]["reason"]


def test_a_build_that_fails_says_what_the_compiler_said(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (gpu / "tools" / "cmake").write_text("#!/bin/sh\necho 'kernel.cu(3): error: no such thing'\nexit 1\n")
    assert gpu_check.main(["-o", str(gpu / "gpu.json"), "--part", "build"]) == 1
    assert "kernel.cu(3): error: no such thing" in capsys.readouterr().err


def test_rows_that_were_measured_are_not_measured_again(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, timed = gpu / "gpu.json", list[str]()

    def time_row(row: Row, *rest: Any) -> dict[str, Any]:
        timed.append(row.name)
        return {"name": row.name, "baselines": [{"name": "kernel", "passed": True}]}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_time, "measure_limits", lambda: {"copy_gb_s": 1.0})
    monkeypatch.setattr(gpu_time, "time_row", time_row)
    monkeypatch.setattr(gpu_parts, "device_of", dict)
    first, second = (row.name for row in rows()[:2])
    assert gpu_check.main(["-o", str(path), "--part", "time", "--seconds", "0"]) == 0
    part = json.loads(path.read_text())["parts"]["time"]
    assert part["status"] == "partial"
    assert timed == [first]
    assert second in part["not_yet_measured"]
    assert gpu_check.main(["-o", str(path), "--part", "time"]) == 0
    part = json.loads(path.read_text())["parts"]["time"]
    assert part["status"] == "done"
    assert timed == [row.name for row in rows()], "each once"


def test_outcomes_of_pytest_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "outcomes.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped message="no GPU"/></testcase>'
        '<testcase name="c"><failure message="1 is\n not 2"/></testcase>'
        '<testcase name="d"><error message="gone"/></testcase></testsuite></testsuites>'
    )
    found = gpu_parts.read_outcomes(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["failures"] == ["c: 1 is not 2", "d: gone"]
    assert found["skip_reasons"] == {"no GPU": 1}
