"""Recipes for tests of quantised bundles, and observations for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from titans_calibration.matmuls import matmul_weights
from titans_calibration.observe import Observations, Observed
from titans_calibration.recipe import ActivationsRecipe, MemoryRecipe, Recipe, WeightsRecipe

RECIPES = {
    "int8": Recipe("int8", weights=WeightsRecipe("int8"), activations=ActivationsRecipe("int8"), smooth=0.5,
                   embedding="int8"),
    "int8-weight-only": Recipe("int8-weight-only", weights=WeightsRecipe("int8", group=32), embedding="float16"),
    "int8-channel": Recipe("int8-channel", weights=WeightsRecipe("int8", method="mse")),
    "int4": Recipe("int4", weights=WeightsRecipe("int4", group=32, method="awq"), embedding="int8"),
    "fp8": Recipe("fp8", weights=WeightsRecipe("fp8"), activations=ActivationsRecipe("fp8")),
    "float16": Recipe("float16", weights=WeightsRecipe("float16"), embedding="float16"),
    "bfloat16": Recipe("bfloat16", weights=WeightsRecipe("bfloat16")),
}  # fmt: skip


def with_memory(name: str, memory_dtype: str, rounding: str = "nearest") -> Recipe:
    return dataclasses.replace(RECIPES[name], memory=MemoryRecipe(memory_dtype, rounding))


def observe_noise(models: dict[str, Any], gram: bool = False, seed: int = 0) -> Observations:
    """Inputs of unit variance, of which some channels are ten times as large."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (rows, _) in matmul_weights(models).items():
        values = rng.standard_normal((64, rows)).astype(np.float32)
        values[:, ::16] *= 10
        found[name] = Observed.empty(rows, gram)
        found[name].add(values, 0)
    return found
