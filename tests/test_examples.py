"""The C and the C++ example, built as a user would: against the installed CMake package, in a folder of their own."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

pytest_plugins = ["cli_fixtures"]
ROOT = Path(__file__).parent.parent


def _run(*command: object, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the runtime. Its build folder is kept, so that a second run compiles nothing."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed: make setup")
    build, target = ROOT / "build" / "install-test", tmp_path_factory.mktemp("prefix")
    _run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release")
    _run("cmake", "--build", build, "-j2")
    _run("cmake", "--install", build, "--prefix", target)
    return target


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_an_example_prints_what_python_computes(
    language: str, prefix: Path, shared_bundle: Path, tmp_path: Path
) -> None:
    _run("cmake", "-S", ROOT / "examples" / language, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    _run("cmake", "--build", tmp_path / "build")
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 5000).astype(np.uint8)))
    library = rt._library.backend_library()
    printed = _run(tmp_path / "build" / "stream_text", shared_bundle, text, TITANS_ONNXRUNTIME=str(library))
    found = re.search(r"^bits_per_byte: ([0-9.]+)$", printed, re.MULTILINE)
    assert found, printed
    with rt.Session(shared_bundle) as session:
        logprobs = session.stream().score(text.read_bytes())
    expected = -float(logprobs.astype(np.float64).sum()) / 5000 / math.log(2)
    assert math.isclose(float(found[1]), expected, abs_tol=2e-6)
