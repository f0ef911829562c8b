"""The shipped checkpoints are what examples/checkpoints/README.md says, and reproduce PyTorch at length."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import shared_bundles
from tolerances import TOLERANCES

from titans_export.checkpoints import load_checkpoint
from titans_export.verifying import PyTorch, verify_stream

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
STABILITY = CHECKPOINTS.parent.parent / "benchmarks" / "results"


def test_mac_bytes_is_what_it_is_said_to_be() -> None:
    model = load_checkpoint(CHECKPOINTS / "mac-bytes").model
    assert model.config.variant == "mac"
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    evaluation = json.loads((CHECKPOINTS / "mac-bytes" / "training.json").read_text())["evaluation"]
    assert evaluation["weights_sha256"] == load_checkpoint(CHECKPOINTS / "mac-bytes").weights_sha256
    assert evaluation["bits_per_byte"]["learning"] <= 1.8


@pytest.mark.parametrize("name", ["mac-bytes", "recall"])
def test_two_million_tokens_were_steady(name: str) -> None:
    record = json.loads((STABILITY / f"stability-{name}.json").read_text())
    assert record["weights_sha256"] == load_checkpoint(CHECKPOINTS / name).weights_sha256
    assert record["tokens"] >= 2_000_000
    assert record["verdict"]["all_finite"]
    assert record["verdict"]["steady"]


@pytest.mark.long
def test_mac_bytes_reproduces_pytorch_over_ten_thousand_bytes() -> None:
    """Real text through the trained model, whose logits are larger than those of the random models elsewhere."""
    text = Path(pydoc_data.topics.__file__).read_bytes()[:10_000]
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    with rt.Session(shared_bundles.mac_bytes(), threads=1) as session:
        report = verify_stream(
            session,
            tokens,
            PyTorch(load_checkpoint(CHECKPOINTS / "mac-bytes").model),
            TOLERANCES["cpu", "float32"],
        )
    assert report.passed, (report.max_abs_error, report.first_bad_position)
