"""Recipes: the formats of a bundle's matmuls, embedding and memories, and how scales are found.

A recipe is a TOML file; the built-in ones are `recipes/NAME.toml`. docs/quantization.md explains the keys.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_export.errors import TitansError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WEIGHT_FORMATS = ("float32", "float16", "bfloat16", "int8", "int4", "fp8")
WEIGHT_METHODS = ("minmax", "mse", "awq", "gptq")
ACTIVATION_FORMATS = ("int8", "fp8")
ACTIVATION_METHODS = ("minmax", "percentile", "entropy", "mse")
EMBEDDING_FORMATS = ("float32", "float16", "int8")
MEMORY_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
ROUNDINGS = ("nearest", "stochastic", "error_feedback")
GROUPS = (16, 32, 64, 128, 256)
FOLDER = Path(__file__).resolve().parent / "recipes"
_SCALED = ("int8", "int4", "fp8")  # weight formats with a scale, which a method has to find
_FROM_DATA = ("awq", "gptq")  # methods that look at the matmuls' inputs


class RecipeError(TitansError):
    """A recipe that is unknown, unreadable or contradictory."""


@dataclass(frozen=True)
class WeightsRecipe:
    """The matmuls' weights. group: input channels per scale; None is one scale per output channel."""

    format: str = "float32"
    group: int | None = None
    method: str = "minmax"


@dataclass(frozen=True)
class ActivationsRecipe:
    """The matmuls' inputs: one scale per tensor, from ranges observed over data."""

    format: str = "int8"
    method: str = "minmax"
    percentile: float = 99.99


@dataclass(frozen=True)
class MemoryRecipe:
    """The dtype of W and S between chunks; see docs/operator.md."""

    dtype: str = "float32"
    rounding: str = "nearest"
    seed: int = 0


@dataclass(frozen=True)
class MixedRecipe:
    """The most sensitive matmuls stay in `fallback`, within one of two budgets.

    max_bits_increase: percent of float32's bits over the held-back data. max_weights_bytes: of all initialisers.
    held_back: share of each stream's end that ranges are not found from.
    """

    max_bits_increase: float | None = None
    max_weights_bytes: int | None = None
    by: str = "matmul"
    fallback: str = "float32"
    held_back: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """smooth: SmoothQuant's alpha. keep: patterns of names of weights that stay float32."""

    name: str
    description: str = ""
    weights: WeightsRecipe = WeightsRecipe()
    activations: ActivationsRecipe | None = None
    smooth: float | None = None
    embedding: str = "float32"
    memory: MemoryRecipe = MemoryRecipe()
    keep: tuple[str, ...] = ()
    mixed: MixedRecipe | None = None

    @property
    def needs_data(self) -> bool:
        """Whether any part of the recipe is found from data."""
        found = self.activations is not None or self.smooth is not None or self.mixed is not None
        return found or self.weights.method in _FROM_DATA

    @property
    def needs_gram(self) -> bool:
        """Whether the recipe needs Gram matrices, the sums of x^T x."""
        return self.weights.method == "gptq"

    def as_dict(self) -> dict[str, Any]:
        """The recipe as in the manifest and in TOML."""
        return dataclasses.asdict(self) | {"keep": list(self.keep)}


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """The built-in recipe of that name, or the one in the file NAME.toml. Raises RecipeError."""
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    if name not in recipe_names():
        problem = f"unknown recipe {name!r}: expected one of {', '.join(recipe_names())}, or a file NAME.toml"
        raise RecipeError("E0801", "recipe", problem, "see --list-recipes")
    return read_recipe(FOLDER / f"{name}.toml")


def read_recipe(path: Path) -> Recipe:
    """The recipe in that file. Raises RecipeError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}"
        raise RecipeError("E0801", "recipe", problem, "check the path") from None
    except ValueError as error:  # syntax, or bytes that are not UTF-8
        raise RecipeError("E0801", "recipe", f"{path} is not TOML: {error}", "correct the file") from None
    return parse_recipe(values, name=path.stem, where=str(path))


def parse_recipe(values: Mapping[str, Any], *, name: str, where: str) -> Recipe:
    """The recipe of these values; errors name `where`. Raises RecipeError."""
    table = _Table(where, "", values, ("description", "weights", "activations", "smooth", "embedding", "memory", "keep",
                                       "mixed"))  # fmt: skip
    recipe = Recipe(
        name=name,
        description=table.text("description", ""),
        weights=_weights(table.table("weights", ("format", "group", "method"))),
        activations=_activations(table.table("activations", ("format", "method", "percentile"))),
        smooth=table.number("smooth", 0.0, 1.0),
        embedding=table.choice("embedding", EMBEDDING_FORMATS, "float32"),
        memory=_memory(table.table("memory", ("dtype", "rounding", "seed"))),
        keep=table.texts("keep"),
        mixed=_mixed(table.table("mixed", [field.name for field in dataclasses.fields(MixedRecipe)])),
    )
    check_recipe(recipe, where)
    return recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises RecipeError if keys of the recipe contradict each other."""
    weights, activations, memory, mixed = recipe.weights, recipe.activations, recipe.memory, recipe.mixed

    def refuse(key: str, problem: str, fix: str) -> None:
        raise RecipeError("E0803", "recipe", f"{key} in {where}: {problem}", fix)

    if weights.format not in _SCALED and weights.group is not None:
        refuse("weights.group", f"{weights.format} has no scale to group", "remove weights.group")
    if weights.format not in _SCALED and weights.method != "minmax":
        refuse("weights.method", f"{weights.format} has no scale to choose", "remove weights.method")
    if weights.format == "int4" and weights.group is None:
        refuse("weights.group", f"int4 needs a group: expected one of {GROUPS}, got none", "add weights.group")
    if weights.format == "fp8" and weights.group is not None:
        refuse("weights.group", "fp8 takes no group", "remove weights.group")
    if weights.method in _FROM_DATA and weights.format not in ("int4", "int8"):
        refuse("weights.method", f"{weights.method} needs int4 or int8", "take minmax or mse")
    if activations is not None and weights.group is not None:
        refuse("weights.group", f"groups of {weights.group} exclude activations", "remove one of the two")
    if activations is not None and activations.format != weights.format:
        problem = f"expected {activations.format} as for activations, got {weights.format}"
        refuse("weights.format", problem, "give both the same format, or remove activations")
    if activations is not None and activations.format == "fp8" and activations.method in ("entropy", "mse"):
        refuse("activations.method", f"{activations.method} excludes fp8", "take minmax or percentile")
    if recipe.smooth is not None and activations is None:
        refuse("smooth", "it needs activations", "remove smooth, or take weights.method 'awq'")
    if memory.dtype == "float32" and memory.rounding != "nearest":
        refuse("memory.rounding", f"{memory.rounding} excludes a float32 memory", "remove memory.rounding")
    if memory.seed and memory.rounding != "stochastic":
        refuse("memory.seed", "only stochastic rounding has a seed", "remove memory.seed")
    if mixed is not None and weights.format not in _SCALED:
        refuse("mixed", f"weights in {weights.format} exclude it", "take int8, int4 or fp8 weights")
    if mixed is not None and mixed.fallback == weights.format:
        refuse("mixed.fallback", f"{weights.format} is the format of the weights", "take one with more bits")


def with_memory(recipe: Recipe, text: str) -> Recipe:
    """The recipe with the memory of `DTYPE[:ROUNDING]`. Raises RecipeError."""
    dtype, _, rounding = text.partition(":")
    values: dict[str, Any] = {"dtype": dtype} | ({"rounding": rounding} if rounding else {})
    memory = _memory(_Table("--memory", "memory", values, ("dtype", "rounding")))
    if memory.rounding == "stochastic":
        memory = dataclasses.replace(memory, seed=recipe.memory.seed)
    recipe = dataclasses.replace(recipe, memory=memory)
    check_recipe(recipe, "--memory")
    return recipe


def _weights(table: _Table | None) -> WeightsRecipe:
    if table is None:
        return WeightsRecipe()
    return WeightsRecipe(
        format=table.choice("format", WEIGHT_FORMATS, None),
        group=table.one_of("group", GROUPS),
        method=table.choice("method", WEIGHT_METHODS, "minmax"),
    )


def _activations(table: _Table | None) -> ActivationsRecipe | None:
    if table is None:
        return None
    method = table.choice("method", ACTIVATION_METHODS, "minmax")
    percentile = table.number("percentile", 50.0, 100.0)
    if percentile is not None and method != "percentile":
        table.refuse("percentile", f"none with method {method!r}", str(percentile), "remove it", "E0803")
    default = ActivationsRecipe().percentile
    return ActivationsRecipe(table.choice("format", ACTIVATION_FORMATS, None), method, percentile or default)


def _memory(table: _Table | None) -> MemoryRecipe:
    if table is None:
        return MemoryRecipe()
    return MemoryRecipe(
        dtype=table.choice("dtype", MEMORY_DTYPES, "float32"),
        rounding=table.choice("rounding", ROUNDINGS, "nearest"),
        seed=table.integer("seed", 0, 2**31 - 1) or 0,
    )


def _mixed(table: _Table | None) -> MixedRecipe | None:
    if table is None:
        return None
    increase = table.number("max_bits_increase", 0.0, 1000.0)
    bytes_ = table.integer("max_weights_bytes", 1, 2**62)
    if (increase is None) == (bytes_ is None):
        got = "neither" if increase is None else "both"
        table.refuse("max_bits_increase", "it or max_weights_bytes", got, "give one budget", "E0803")
    held_back = table.number("held_back", 0.05, 0.5)
    default = MixedRecipe()
    return MixedRecipe(
        max_bits_increase=increase,
        max_weights_bytes=bytes_,
        by=table.choice("by", ("matmul", "layer"), default.by),
        fallback=table.choice("fallback", ("float32", "float16", "bfloat16", "int8"), default.fallback),
        held_back=default.held_back if held_back is None else held_back,
    )


class _Table:
    """One table of a recipe file. Unknown keys are errors."""

    def __init__(self, where: str, prefix: str, values: Any, known: Sequence[str]) -> None:
        self._where, self._prefix = where, prefix
        if not isinstance(values, Mapping):
            problem = f"{prefix} in {where}: expected a table, got {repr(values)[:80]}"
            raise RecipeError("E0802", "recipe", problem, f"write [{prefix}]")
        self._values = values
        if unknown := sorted(set(values) - set(known)):
            place = f"[{prefix}] of {where}" if prefix else where
            problem = f"unknown key {unknown[0]!r} in {place}: expected {', '.join(known)}"
            raise RecipeError("E0802", "recipe", problem, "remove it or correct its name")

    def refuse(self, key: str, expected: str, got: str, fix: str, code: str = "E0802") -> None:
        name = f"{self._prefix}.{key}" if self._prefix else key
        raise RecipeError(code, "recipe", f"{name} in {self._where}: expected {expected}, got {got}", fix)

    def table(self, key: str, known: Sequence[str]) -> _Table | None:
        return _Table(self._where, key, self._values[key], known) if key in self._values else None

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a string", repr(value), "put it in quotes")
        return str(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
            self.refuse(key, "a list of strings", repr(value)[:80], 'write keep = ["model.head.*"]')
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None) -> str:
        value = self._values.get(key, default)
        if value not in allowed:
            got = "none" if value is None else repr(value)
            self.refuse(key, f"one of {', '.join(allowed)}", got, "take one of these")
        return str(value)

    def one_of(self, key: str, allowed: tuple[int, ...]) -> int | None:
        value = self._values.get(key)
        if value is not None and (isinstance(value, bool) or value not in allowed):
            self.refuse(key, f"one of {', '.join(map(str, allowed))}", repr(value), "take one of these")
        return None if value is None else int(value)

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= most:
            self.refuse(key, f"a number from {least:g} to {most:g}", repr(value), "give a number in this range")
        return float(value)

    def integer(self, key: str, least: int, most: int) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most}", repr(value), "give an integer in this range")
        return int(value)
