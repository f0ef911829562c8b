"""A model whose matmuls are large enough to be quantised, exported once, and text for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_tools import TEXT
from cli_tools import invoke
from shared_bundles import copy_of

from titans_export.checkpoints import titans
from titans_export.model import MemoryConfig, ModelConfig, Titans


@pytest.fixture(scope="session")
def model() -> Titans:
    """A layer of MAC, 64 wide."""
    torch.manual_seed(0)
    memory = MemoryConfig(heads=2, head_dim=16, chunk=8)
    config = ModelConfig(
        vocab_size=256, dim=64, layers=1, hidden=64, variant="mac", memory=memory, attention_heads=2, window=16,
        persistent=2,
    )  # fmt: skip
    return Titans(config)


@pytest.fixture(scope="session")
def float32_bundle(model: Titans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle. Not to be changed."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("calibration")
    titans.save(model, folder / "checkpoint")

    def export(path: Path) -> None:
        result = invoke("export", folder / "checkpoint", "-o", path, "--chunks-per-call", 1, "--positions", 64)
        assert result.code == 0, result.err

    return copy_of("float32", export, folder)


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of the standard library."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes(TEXT)
    return path
