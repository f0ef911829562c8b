"""The textbook kernel, plugins/kernels/neural_memory_textbook.cc, passes the tests of the fast kernels' float32 memory.

So the code that explains the operator agrees with autograd in float64, and the fast kernels agree with both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_kernel as fast
from kernel_runner import NATIVE, Target

pytestmark = pytest.mark.skipif(not Path(NATIVE[0]).exists(), reason="neural_memory_run is not built: make kernels")

TEXTBOOK = Target("textbook", tuple(NATIVE), ("--target", "textbook"))


@pytest.mark.parametrize("name", fast.SHAPES)
def test_any_cut_equals_the_recurrence(name: str, tmp_path: Path) -> None:
    fast.test_any_cut_equals_the_recurrence(TEXTBOOK, name, True, tmp_path)


@pytest.mark.parametrize("name", ["linear", "mlp2-silu", "mlp-31-67-31-gelu-residual-norm", "chunk-1"])
def test_whole_chunks_and_reading(name: str, tmp_path: Path) -> None:
    fast.test_whole_chunks_leave_w_and_s_of_the_recurrence(TEXTBOOK, name, tmp_path)
    fast.test_read_mode_answers_from_the_chunk_start(TEXTBOOK, name, tmp_path)


def test_ragged_streams_and_freezing(tmp_path: Path) -> None:
    fast.test_streams_of_one_call_may_stand_anywhere_in_their_chunks(TEXTBOOK, tmp_path)
    fast.test_freezing_midway_holds_the_memory_and_resuming_goes_on(TEXTBOOK, tmp_path)
    fast.test_a_frozen_chunk_leaves_every_bit(TEXTBOOK, tmp_path)
    fast.test_aligned_calls_stop_at_the_last_valid_chunk(TEXTBOOK, tmp_path)


@pytest.mark.parametrize("way", ["aligned", "tokens", "blocks"])
def test_the_guard(way: str, tmp_path: Path) -> None:
    fast.test_guard_drops_a_chunk_that_is_too_large_or_not_a_number(TEXTBOOK, way, "float32", tmp_path)


def test_another_memory_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected memory_dtype \"float32\", got another\. Fix: .*TITANS-E0712"):
        fast.test_guard_drops_a_chunk_that_is_too_large_or_not_a_number(TEXTBOOK, "tokens", "bfloat16", tmp_path)
