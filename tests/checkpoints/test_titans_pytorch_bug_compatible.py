"""`--bug-compatible`: what titans-pytorch's own cached decoding computes, also where it differs from training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: pip install 'titans-export[bench]'")

from library_models import cached_decoding, double, make_transformer, parallel_forward
from tolerances import TOLERANCES

from titans_export.checkpoints.titans_pytorch import from_live
from titans_export.exporting import export_loaded

LENGTH = 30  # a window has 6 rows, 5 of them tokens
# The library's rotary angles and Sinkhorn iterations are float32 in float64 too.
CLOSE = 1e-5
MEMORY: dict[str, Any] = {
    "dim_head": 8,
    "heads": 2,
    "attn_pool_chunks": True,
    "qk_rmsnorm": True,
    "per_parameter_lr_modulation": True,
    "default_step_transform_max_lr": 0.1,
}


def make(
    seed: int = 0, *, chunk: int = 4, batch: int | None = 8, memory: dict[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    arguments: dict[str, Any] = {
        "num_tokens": 32,
        "dim": 16,
        "depth": 2,
        "segment_len": 5,
        "num_longterm_mem_tokens": 1,
        "num_persist_mem_tokens": 2,
        "dim_head": 8,
        "heads": 2,
        "neural_memory_segment_len": chunk,
        "neural_memory_batch_size": batch,
        "neural_memory_layers": (1, 2),
        "neural_mem_weight_residual": True,
        "neural_memory_qkv_receives_diff_views": True,
        "sliding_window_attn": True,
    }
    return make_transformer(seed, "mlp-2", MEMORY | (memory or {}), **arguments | kwargs)


def tokens(seed: int = 1, count: int = LENGTH) -> Tensor:
    return torch.randint(0, 32, (count,), generator=torch.Generator().manual_seed(seed))


def ours(module: nn.Module, stream: Tensor, bug_compatible: int | None, cuts: list[int]) -> Tensor:
    """Our model in float64, fed in the given cuts."""
    model = from_live(module, bug_compatible=bug_compatible).model.double()
    state, out, position = model.initial_state(1), [], 0
    for part in stream.split(cuts):
        y, state = model.feed(part[None], state, position)
        out.append(y[0])
        position += len(part)
    return torch.cat(out)


def distances(module: nn.Module, prompt: int, count: int = LENGTH) -> tuple[float, float]:
    """Largest distance from cached decoding, over every position, with bug_compatible and without."""
    stream = tokens(count=count)
    right = cached_decoding(double(module), stream, prompt)
    assert right.shape == (count, 32)
    assert torch.isfinite(right).all()
    errors = []
    for bugs in (prompt, None):
        got = ours(module, stream, bugs, [prompt, *(1,) * (count - prompt)])
        errors.append(float((got - right).abs().max()))
    return errors[0], errors[1]


@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "segmented"])
# Rows: 1; below and at a chunk; one short of two chunks, two; a window and more; at a segment's end and between.
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 6, 7, 10, 13])
def test_is_the_cached_decoding(prompt: int, sliding: bool) -> None:
    close, apart = distances(make(sliding_window_attn=sliding), prompt)
    assert close < CLOSE
    assert apart > 1e-3


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "no longterm rows, segmented": (7, {"num_longterm_mem_tokens": 0, "sliding_window_attn": False}),
    "no longterm rows, sliding": (3, {"num_longterm_mem_tokens": 0}),
    "longterm rows, more than tokens": (3, {"num_longterm_mem_tokens": 4, "segment_len": 3, "count": 24}),
    "chunks longer than a window": (4, {"chunk": 8, "batch": None, "sliding_window_attn": False}),
    "chunks of 1": (1, {"chunk": 1, "batch": None, "memory": {"attn_pool_chunks": False}}),
    "one residual stream": (6, {"num_residual_streams": 1, "sliding_window_attn": False}),
    "gates of attention": (6, {"neural_mem_gate_attn_output": True}),
    "momentum of order 2": (2, {"memory": {"momentum_order": 2, "learned_momentum_combine": True}}),
    "memories in some layers": (2, {"depth": 3, "neural_memory_layers": (1, 3), "count": 24}),
}


@pytest.mark.parametrize("name", CASES)
def test_with_other_options(name: str) -> None:
    prompt, options = CASES[name]
    count = options.get("count", LENGTH)
    module = make(**{key: value for key, value in options.items() if key != "count"})
    close, apart = distances(module, prompt, count)
    assert close < CLOSE
    assert apart > 1e-3


# What the library's decoding does otherwise, each alone: options, prompt, and whether it differs from training.
ALONE: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "nothing": (10, False, {}),
    "persistent keys at other angles": (10, True, {"num_persist_mem_tokens": 2}),
    "the second chunk's weight residual": (3, True, {"neural_mem_weight_residual": True}),
    "no second chunk after the prompt": (8, False, {"neural_mem_weight_residual": True}),
    "a segmented cache that is not aligned": (7, True, {"sliding_window_attn": False}),
    "a segmented cache that is aligned": (10, False, {"sliding_window_attn": False, "num_longterm_mem_tokens": 0}),
    "a segmented cache shorter than a window": (4, False, {"sliding_window_attn": False}),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_deviation_alone(name: str) -> None:
    prompt, differs, options = ALONE[name]
    close, apart = distances(
        make(**{"num_persist_mem_tokens": 0, "neural_mem_weight_residual": False} | options), prompt
    )
    assert close < CLOSE
    assert apart > 1e-3 if differs else apart < CLOSE


def test_the_prompt_is_as_in_training() -> None:
    module, stream = make(sliding_window_attn=False), tokens()
    right = parallel_forward(double(module), stream)
    got = ours(module, stream, 13, [LENGTH])
    assert (got - right)[:13].abs().max() < CLOSE


@pytest.mark.long
def test_through_a_bundle(tmp_path: Path) -> None:
    titans_runtime = pytest.importorskip("titans_runtime", reason="the runtime is not built", exc_type=ImportError)
    module, stream, prompt = make(sliding_window_attn=False), tokens(), 3
    checkpoint = from_live(module, bug_compatible=prompt)
    report = export_loaded(checkpoint, tmp_path / "mac.titans", chunks_per_call=1, positions=16)
    assert report.library_error is None
    right = cached_decoding(double(module), stream, prompt).numpy()
    with titans_runtime.Session(tmp_path / "mac.titans") as session:
        assert session.info["model"]["config"]["bug_compatible_after"] == prompt
        for cuts in ([LENGTH], [prompt, *(1,) * (LENGTH - prompt)]):
            fed = session.stream()
            got = np.concatenate([fed.feed(part.numpy()) for part in stream.split(cuts)])
            assert np.abs(got - right).max() < TOLERANCES["cpu", "float32"]
