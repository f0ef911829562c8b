"""A small random model of each variant, exported once."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from shared_bundles import all_made_once
from variants import CONFIGS

from titans_export.checkpoints.titans import save
from titans_export.exporting import export_checkpoint
from titans_export.model import Titans


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        model = Titans(config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.add_(0.1 * torch.randn_like(p))
                if key.endswith("gates.bias"):
                    # Forget a few per cent a token, as trained models do: a random memory that keeps everything is
                    # chaotic, and PyTorch's own float32 leaves float64 within a few hundred tokens.
                    p[2 * config.memory.heads :] += 3
        made[name] = folder / name
        save(model, made[name])
    return made


@pytest.fixture(scope="session")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("bundles")
    made = all_made_once(
        {
            f"variant-{name}": partial(export_checkpoint, checkpoint, chunks_per_call=3, positions=100)
            for name, checkpoint in checkpoints.items()
        }
    )
    return {name: Path(shutil.copytree(made[f"variant-{name}"], folder / f"{name}.titans")) for name in checkpoints}
