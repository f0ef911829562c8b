"""The library for aarch64, emulated: its C++ tests, with the kernel in NEON inside ONNX Runtime, and streams that move
from one processor to another.

Left out are the tests of backends for GPUs, which are the same code on every host.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from emulation import BUILD, EMULATOR, FETCHED, onnxruntime, why_not
from tolerances import TOLERANCES

from titans_export.checkpoints.titans import load

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

pytest_plugins = ["cli_fixtures"]
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=why_not())]
needs_onnxruntime = pytest.mark.skipif(
    onnxruntime() is None, reason="no ONNX Runtime for aarch64: tools/fetch_aarch64 says why"
)
needs_libcrypto = pytest.mark.skipif(
    not (FETCHED / "lib" / "libcrypto.so.3").exists(), reason="no libcrypto for aarch64: tools/fetch_aarch64 says why"
)

TESTS = BUILD / "tests" / "cpp"


def run(program: str, *arguments: object, **environment: str) -> str:
    command = [*EMULATOR, str(TESTS / program), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("titans_tests", marks=needs_libcrypto),
        "titans_kernel_tests",
        "titans_cuda_plan_tests",
    ],
)
def test_cpp(program: str) -> None:
    out = run(program)
    assert "[  PASSED  ]" in out
    assert "[  FAILED  ]" not in out


@needs_onnxruntime
def test_cpp_in_onnxruntime(shared_bundle: Path) -> None:
    out = run("titans_onnxruntime_tests", TITANS_TEST_BUNDLE=str(shared_bundle), TITANS_ONNXRUNTIME=str(onnxruntime()))
    assert "[       OK ] OnnxRuntimeTest.FeedInOneAndInSteps" in out
    assert "[  SKIPPED ]" not in out


@needs_onnxruntime
@pytest.mark.parametrize("first", ["here", "aarch64"])
def test_a_saved_stream_goes_on_on_the_other_processor(
    first: str, checkpoint: Path, shared_bundle: Path, tmp_path: Path
) -> None:
    """Against PyTorch, which consumes all tokens; the state is saved in the middle of a chunk."""
    vocab = load(checkpoint).model.output.size
    tokens = np.random.default_rng(8).integers(0, vocab, 90)
    half, kept = 46, tmp_path / "stream.tstate"

    def here(from_: Path | None, to: Path | None, some: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with rt.Session(shared_bundle, threads=1) as session:
            stream = session.stream() if from_ is None else session.restore(from_)
            logits = stream.feed(some, outputs="last")
            if to is not None:
                stream.save(to)
        return np.asarray(logits, np.float32).reshape(-1)

    def aarch64(from_: Path | None, to: Path | None, some: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        arguments = shared_bundle, from_ or "-", to or "-", *some
        out = run("titans_stream_exchange", *arguments, TITANS_ONNXRUNTIME=str(onnxruntime()))
        return np.array(out.split(), np.float32)

    begin, go_on = (here, aarch64) if first == "here" else (aarch64, here)
    begin(None, kept, tokens[:half])
    got = go_on(kept, None, tokens[half:])
    model = load(checkpoint).model
    expected, _ = model.feed(torch.from_numpy(tokens)[None], model.initial_state(1), 0)
    assert np.abs(got - expected[0, -1].detach().numpy()).max() < TOLERANCES["cpu", "float32"]
    fresh = go_on(None, None, tokens[half:])
    assert np.abs(fresh - got).max() > 10 * TOLERANCES["cpu", "float32"], "the state changes nothing in this test"
