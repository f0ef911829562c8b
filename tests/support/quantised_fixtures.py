"""A small bundle whose matmuls are large enough to be quantised, and quantised forms of it, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from quantised_tools import observe_noise
from shared_bundles import copy_of

from titans_calibration.graphs import Quantised, quantise_graphs
from titans_calibration.options import QuantizeOptions
from titans_calibration.recipe import Recipe
from titans_calibration.source import open_source
from titans_calibration.writing import write_quantised
from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans import save
from titans_export.exporting import export_checkpoint
from titans_export.model import MemoryConfig, ModelConfig, Titans


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(3)
    memory = MemoryConfig(2, 16, 8)
    model = Titans(ModelConfig("mag", 96, 64, 1, 64, memory, attention_heads=2, window=16, persistent=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.05 * torch.randn_like(p))
            if name.endswith("gates.bias"):
                p[2 * memory.heads :] += 3  # forget a little: a memory that keeps everything is chaotic
    save(model, folder / "checkpoint")
    export = partial(export_checkpoint, folder / "checkpoint", chunks_per_call=2, positions=40)
    return copy_of("small", export, folder)


Quantise = Callable[[Recipe], Quantised]


@pytest.fixture(scope="session")
def quantise(small_bundle: Path) -> Quantise:
    models = open_source(read_bundle(small_bundle)).models
    return lambda recipe: quantise_graphs(models, recipe, observe_noise(models) if recipe.needs_data else None)


@pytest.fixture(scope="session")
def quantised_bundle(
    small_bundle: Path, quantise: Quantise, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe], Path]:
    """Writes the small bundle in a recipe's form, each once."""
    folder = tmp_path_factory.mktemp("quantised")
    made: dict[Recipe, Path] = {}

    def make(recipe: Recipe) -> Path:
        if recipe not in made:
            made[recipe] = folder / f"{len(made)}.titans"
            options = QuantizeOptions(small_bundle, made[recipe], recipe)
            write_quantised(read_bundle(small_bundle), quantise(recipe), options)
        return made[recipe]

    return make
