"""A machine with a GPU's programs, for tests of the tools that run there."""

from __future__ import annotations

import os
from pathlib import Path

import fake_gpu
import pytest

from benchmarks import gpu_machine, gpu_parts


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine with programs of a GPU's names first, and a build folder of its own."""
    folder = tmp_path / "tools"
    folder.mkdir()
    program = tmp_path / "build" / "bin" / "neural_memory_run_cuda"
    fake_gpu.make_machine(folder, program)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.setattr(gpu_machine, "hash_sources", lambda: "abc")  # somebody may be editing
    monkeypatch.setattr(gpu_parts, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_parts, "PROGRAM", program)
    return tmp_path
