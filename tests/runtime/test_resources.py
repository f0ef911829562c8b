"""What a session costs: memory, dependencies, and what its library exports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import Weights, write_bundle

ROOT = Path(__file__).parents[2]

# A process of its own, so that nothing else counts. RSS includes the pages of the mapped weights that were touched.
MEASURE = """
import re, sys
import titans_runtime as rt

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

rt.Session(sys.argv[1], threads=1).close()  # libraries and their tables are in now
before = resident()
session = rt.Session(sys.argv[2], threads=1)
stream = session.stream()
stream.feed(b"\\1" * 13, outputs="none")  # prefill, chunk and decode
print(resident() - before)
"""


def test_three_graphs_hold_a_weight_once(tmp_path: Path) -> None:
    megabyte = 1 << 20
    write_bundle(tmp_path / "small.titans", Weights.random())
    large = write_bundle(tmp_path / "large.titans", Weights.random(ballast=4096))
    assert (large / "weights.safetensors").stat().st_size > 64 * megabyte
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small.titans"), str(large)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown = int(result.stdout) / megabyte
    # The weight in its mapping, and at most once more, for all three graphs, as the kernels want it.
    print(f"resident memory grew by {grown:.0f} MB")
    assert grown < 2 * 64 + 16


def test_the_package_needs_numpy_alone() -> None:
    code = "import sys, titans_runtime; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.long
@pytest.mark.timeout(1200)  # compiles the runtime
def test_an_install_brings_neither_torch_nor_onnx(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT / "runtime" / "python"], check=True)
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    names = {line.split("==")[0].lower().replace("_", "-") for line in listing.stdout.split()}
    assert names - {"pip", "setuptools"} == {"numpy", "titans-runtime"}
    # What points at a build of the checkout would hide what the wheel lacks.
    env = {name: value for name, value in os.environ.items() if name not in ("TITANS_LIBRARY", "PYTHONPATH")}
    code = "import titans_runtime as rt; print(rt.__version__)"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert f"titans-runtime=={version.stdout.strip()}" in listing.stdout.replace("_", "-")
