"""Small random models, each exported once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_tools import TEXT, invoke, save_model
from shared_bundles import copy_of

from titans_export.model import MemoryConfig

# More threads only wait for each other with models this small.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MAC, which has every kind of state and both kinds of memory nodes."""
    memory = MemoryConfig(heads=2, head_dim=8, chunk=4)
    folder = tmp_path_factory.mktemp("checkpoints") / "mac"
    return save_model(folder, variant="mac", memory=memory, attention_heads=2, window=8, persistent=2)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of one token, so a single graph: the quickest to export."""
    return save_model(
        tmp_path_factory.mktemp("checkpoints") / "tiny",
        variant="lmm",
        memory=MemoryConfig(heads=1, head_dim=4, chunk=1),
    )


@pytest.fixture(scope="session")
def shared_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MAC model exported. Not to be changed: `bundle` is a copy for that."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

    def export(path: Path) -> None:
        result = invoke("export", checkpoint, "-o", path, "--chunks-per-call", 1, "--positions", 64, "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert report["bundle"] == str(path)
        assert report["max_abs_error"] <= report["tolerance"]

    return copy_of("mac", export, tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the exported MAC model."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "mac.titans"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of a few thousand bytes."""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path
