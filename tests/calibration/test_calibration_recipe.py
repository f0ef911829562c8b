"""Recipes: the built-in ones, and every mistake in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_calibration.recipe import (
    ActivationsRecipe,
    MemoryRecipe,
    MixedRecipe,
    Recipe,
    RecipeError,
    WeightsRecipe,
    load_recipe,
    parse_recipe,
    read_recipe,
    recipe_names,
    with_memory,
)

INT8 = '[weights]\nformat = "int8"\n'
INT4 = '[weights]\nformat = "int4"\ngroup = 32\n'
ACTIVATIONS = '[activations]\nformat = "int8"\n'

# Each mistake with what the message must say: the key, and what is allowed.
MISTAKES = {
    "no TOML": ("weights = {", "TOML"),
    "unknown key": ("wieghts = 1", "wieghts", "weights"),
    "unknown key in a table": (INT8 + "bits = 8\n", "[weights]", "bits", "group"),
    "no table": ("weights = 8", "[weights]"),
    "no format": ("[weights]\n", "weights.format", "int8", "none"),
    "unknown format": ('[weights]\nformat = "int3"', "weights.format", "int3", "bfloat16"),
    "format of another type": ("[weights]\nformat = 8", "weights.format", "8"),
    "unknown method": (INT8 + 'method = "best"', "weights.method", "gptq"),
    "group that is none": (INT8 + "group = 33", "weights.group", "33", "32"),
    "group that is a bool": (INT8 + "group = true", "weights.group", "True"),
    "int4 without a group": ('[weights]\nformat = "int4"', "weights.group", "none"),
    "fp8 with a group": ('[weights]\nformat = "fp8"\ngroup = 32', "weights.group", "fp8"),
    "float16 with a group": ('[weights]\nformat = "float16"\ngroup = 32', "weights.group", "float16"),
    "float16 with a method": ('[weights]\nformat = "float16"\nmethod = "mse"', "weights.method", "float16"),
    "gptq with fp8": ('[weights]\nformat = "fp8"\nmethod = "gptq"', "weights.method", "gptq"),
    "awq with fp8": ('[weights]\nformat = "fp8"\nmethod = "awq"', "weights.method", "awq"),
    "activations of another format": (INT8 + '[activations]\nformat = "fp8"', "weights.format", "fp8"),
    "activations alone": (ACTIVATIONS, "weights.format", "float32"),
    "activations with groups": (INT8 + "group = 32\n" + ACTIVATIONS, "weights.group", "32"),
    "percentile of another method": (INT8 + ACTIVATIONS + "percentile = 99.9", "activations.percentile", "minmax"),
    "percentile too low": (
        INT8 + ACTIVATIONS + 'method = "percentile"\npercentile = 5', "activations.percentile", "50",
    ),
    "mse with fp8": (
        '[weights]\nformat = "fp8"\n[activations]\nformat = "fp8"\nmethod = "mse"', "activations.method", "minmax",
    ),
    "smooth without activations": ("smooth = 0.5\n" + INT8, "smooth", "activations"),
    "smooth too large": ("smooth = 1.5\n" + INT8 + ACTIVATIONS, "smooth", "1"),
    "smooth that is text": ('smooth = "much"\n' + INT8 + ACTIVATIONS, "smooth", "number"),
    "smooth that is nan": ("smooth = nan\n" + INT8 + ACTIVATIONS, "smooth", "number"),
    "embedding in int4": ('embedding = "int4"', "embedding", "float16"),
    "unknown memory dtype": ('[memory]\ndtype = "int4"', "memory.dtype", "bfloat16"),
    "unknown rounding": ('[memory]\ndtype = "int8"\nrounding = "up"', "memory.rounding", "stochastic"),
    "rounding of float32": ('[memory]\nrounding = "stochastic"', "memory.rounding", "float32"),
    "seed without noise": ('[memory]\ndtype = "int8"\nseed = 1', "memory.seed", "stochastic"),
    "seed below zero": ('[memory]\ndtype = "int8"\nrounding = "stochastic"\nseed = -1', "memory.seed", "-1"),
    "keep that is text": ('keep = "model.head.*"', "keep", "list"),
    "keep of numbers": ("keep = [1]", "keep", "list"),
    "description of numbers": ("description = 1", "description", "string"),
    "no budget": (INT8 + "[mixed]\n", "mixed.max_bits_increase", "neither"),
    "two budgets": (INT8 + "[mixed]\nmax_bits_increase = 1\nmax_weights_bytes = 1", "max_bits_increase", "both"),
    "budget below zero": (INT8 + "[mixed]\nmax_bits_increase = -1", "mixed.max_bits_increase", "-1"),
    "budget of half a byte": (INT8 + "[mixed]\nmax_weights_bytes = 0.5", "mixed.max_weights_bytes", "integer"),
    "mixed by heads": (INT8 + '[mixed]\nmax_bits_increase = 1\nby = "head"', "mixed.by", "layer"),
    "mixed of float32": ("[mixed]\nmax_bits_increase = 1", "mixed", "float32"),
    "mixed of one format": (INT8 + '[mixed]\nmax_bits_increase = 1\nfallback = "int8"', "mixed.fallback", "int8"),
    "all held back": (INT8 + "[mixed]\nmax_bits_increase = 1\nheld_back = 1", "mixed.held_back", "0.5"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_file_and_key(mistake: str, tmp_path: Path) -> None:
    text, *words = MISTAKES[mistake]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        read_recipe(path)
    for word in (str(path), *words):
        assert word in str(raised.value)


def test_a_file_is_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'description = "mine"\nsmooth = 0.25\nembedding = "float16"\nkeep = ["model.head.*"]\n'
        '[weights]\nformat = "int8"\nmethod = "mse"\n'
        '[activations]\nformat = "int8"\nmethod = "percentile"\npercentile = 99.9\n'
        '[memory]\ndtype = "int8"\nrounding = "stochastic"\nseed = 7\n'
        '[mixed]\nmax_weights_bytes = 1000\nby = "layer"\nfallback = "bfloat16"\nheld_back = 0.1\n'
    )
    assert load_recipe(str(path)) == Recipe(
        name="mine",
        description="mine",
        weights=WeightsRecipe("int8", None, "mse"),
        activations=ActivationsRecipe("int8", "percentile", 99.9),
        smooth=0.25,
        embedding="float16",
        memory=MemoryRecipe("int8", "stochastic", 7),
        keep=("model.head.*",),
        mixed=MixedRecipe(None, 1000, "layer", "bfloat16", 0.1),
    )


def test_an_empty_file_changes_nothing() -> None:
    recipe = parse_recipe({}, name="nothing", where="here")
    assert recipe == Recipe("nothing")
    assert not recipe.needs_data


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_are_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe != Recipe(name, recipe.description)


def test_the_built_in_recipes_are_those_promised() -> None:
    promised = {"fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only", "fp8", "mixed", "memory-bf16"}
    assert promised | {"memory-int8"} <= set(recipe_names())


def test_needs_of_a_recipe() -> None:
    assert load_recipe("int8").needs_data and not load_recipe("int8").needs_gram
    assert load_recipe("int4-weight-only").needs_gram
    assert not any(load_recipe(name).needs_data for name in ("fp16", "bf16", "int8-weight-only", "memory-int8"))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'int9'.*int8-weight-only.*--list-recipes"):
        load_recipe("int9")
    with pytest.raises(RecipeError, match=r"nowhere\.toml cannot be read"):
        load_recipe("nowhere.toml")


def test_the_memory_of_the_command_line_overrules() -> None:
    recipe = load_recipe("memory-int8")
    assert with_memory(recipe, "bfloat16").memory == MemoryRecipe("bfloat16", "nearest", 0)
    assert with_memory(recipe, "fp8:error_feedback").memory == MemoryRecipe("fp8", "error_feedback", 0)
    assert with_memory(recipe, "float32").memory == MemoryRecipe()
    for text in ("int4", "int8:up", "float32:stochastic"):
        with pytest.raises(RecipeError, match="--memory"):
            with_memory(recipe, text)
