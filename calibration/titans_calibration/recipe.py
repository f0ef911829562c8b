"""A recipe: which numbers a bundle's matmuls, embedding and memories are held in, and how they are found.

Recipes are data, in TOML: the built-in ones in `recipes/NAME.toml`, others in files of their own. docs/quantization.md
says what each key means.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
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
    """A recipe that is not there, not readable or asks for what does not go together."""


@dataclass(frozen=True)
class WeightsRecipe:
    """The matmuls' weights. `group`: one scale for so many elements along the input dimension, None: one a channel."""

    format: str = "float32"
    group: int | None = None
    method: str = "minmax"


@dataclass(frozen=True)
class ActivationsRecipe:
    """The matmuls' other inputs, one scale a tensor, from the ranges they took over the data."""

    format: str = "int8"
    method: str = "minmax"
    percentile: float = 99.99


@dataclass(frozen=True)
class MemoryRecipe:
    """How memories hold W and S between chunks, docs/operator.md."""

    dtype: str = "float32"
    rounding: str = "nearest"
    seed: int = 0


@dataclass(frozen=True)
class MixedRecipe:
    """Matmuls that matter most stay in `fallback`, as many as the budget takes.

    One of the two limits is there: bits over the held-back data at most so many percent above float32's, or all
    weights within so many bytes. `held_back` is the part of the data's end that nothing else is found from.
    """

    max_bits_increase: float | None = None
    max_weights_bytes: int | None = None
    by: str = "matmul"
    fallback: str = "float32"
    held_back: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """What a quantised bundle is to be.

    `smooth` is SmoothQuant's alpha; `keep` are patterns of names of weights that stay float32.
    """

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
        """Whether anything of it is found from what the model does over data."""
        found = self.activations is not None or self.smooth is not None or self.mixed is not None
        return found or self.weights.method in _FROM_DATA

    @property
    def needs_gram(self) -> bool:
        """Whether it takes the sums of x^T x."""
        return self.weights.method == "gptq"

    def as_dict(self) -> dict[str, Any]:
        """The recipe as the manifest has it, and as TOML would."""
        return dataclasses.asdict(self) | {"keep": list(self.keep)}


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """The built-in recipe of that name, or the one in the file NAME.toml. Raises RecipeError."""
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    if name not in recipe_names():
        known = ", ".join(recipe_names())
        raise RecipeError("recipe", f"one of {known}, or a file that ends in .toml", repr(name), "see --list-recipes")
    return read_recipe(FOLDER / f"{name}.toml")


def read_recipe(path: Path) -> Recipe:
    """The recipe in that file. Raises RecipeError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError("recipe", f"{path} to be readable", error.strerror or str(error), "check the path") from None
    except ValueError as error:  # of the syntax, or bytes that are no UTF-8
        raise RecipeError("recipe", f"TOML in {path}", str(error), "mend the file") from None
    return parse_recipe(values, name=path.stem, where=str(path))


def parse_recipe(values: Mapping[str, Any], *, name: str, where: str) -> Recipe:
    """The recipe of these values; `where` is what errors call its place. Raises RecipeError."""
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
    """Raises RecipeError where parts of the recipe do not go together."""
    weights, activations = recipe.weights, recipe.activations

    def refuse(key: str, expected: str, got: str, remedy: str) -> None:
        raise RecipeError("recipe", f"{key} of {where} to be {expected}", got, remedy)

    if weights.format not in _SCALED and (weights.group is not None or weights.method != "minmax"):
        key = "weights.group" if weights.group is not None else "weights.method"
        got = f"{weights.group if weights.group is not None else weights.method!r}"
        refuse(key, f"absent with weights in {weights.format}, which have no scale", got, "leave it out")
    if weights.format == "int4" and weights.group is None:
        refuse("weights.group", f"one of {GROUPS} with int4", "none", "give it: one scale a channel loses too much")
    if weights.format == "fp8" and weights.group is not None:
        refuse("weights.group", "absent with fp8", str(weights.group), "leave it out")
    if weights.method == "awq" and weights.format not in ("int4", "int8"):
        refuse("weights.method", "'minmax' or 'mse' with this format", "'awq'", "take awq with int4 or int8")
    if weights.method == "gptq" and weights.format not in ("int4", "int8"):
        refuse("weights.method", "'minmax' or 'mse' with this format", "'gptq'", "take gptq with int4 or int8")
    if activations is not None and (activations.format != weights.format or weights.group is not None):
        expected = f"{activations.format} without groups, as its activations" if weights.group is None else "absent"
        key = "weights.format" if weights.group is None else "weights.group"
        got = repr(weights.format) if weights.group is None else str(weights.group)
        refuse(key, expected, got, "give both the same format, one scale a channel, or leave activations out")
    if activations is not None and activations.format == "fp8" and activations.method in ("entropy", "mse"):
        expected = "'minmax' or 'percentile' with fp8, whose steps grow with the values"
        refuse("activations.method", expected, repr(activations.method), "take one of them")
    if recipe.smooth is not None and activations is None:
        refuse("smooth", "absent without activations", str(recipe.smooth), "leave it out, or take weights.method 'awq'")
    if recipe.memory.dtype == "float32" and recipe.memory.rounding != "nearest":
        refuse("memory.rounding", "absent with float32", repr(recipe.memory.rounding), "leave it out")
    if recipe.memory.seed and recipe.memory.rounding != "stochastic":
        refuse("memory.seed", "absent unless rounding is stochastic", str(recipe.memory.seed), "leave it out")
    if recipe.mixed is not None and weights.format not in _SCALED:
        refuse("mixed", f"absent with weights in {weights.format}", "a table", "take int8, int4 or fp8 weights")
    if recipe.mixed is not None and recipe.mixed.fallback == weights.format:
        got = repr(weights.format)
        refuse("mixed.fallback", "another format than the weights", got, "take one with more bits")


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
        table.refuse("percentile", f"absent with method {method!r}", str(percentile), "leave it out")
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
        table.refuse("max_bits_increase", "there, or max_weights_bytes, one of the two", got, "give one budget")
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
    """One table of a recipe, whose keys are all known."""

    def __init__(self, where: str, prefix: str, values: Any, known: Any) -> None:
        self._where, self._prefix = where, prefix
        if not isinstance(values, Mapping):
            raise RecipeError("recipe", f"a table {prefix} in {where}", repr(values)[:80], f"write [{prefix}]")
        self._values = values
        if unknown := sorted(set(values) - set(known)):
            place = f"[{prefix}] of {where}" if prefix else where
            raise RecipeError(
                "recipe", f"only the keys {', '.join(known)} in {place}", repr(unknown[0]), "remove it or mend its name"
            )

    def refuse(self, key: str, expected: str, got: str, remedy: str) -> None:
        name = f"{self._prefix}.{key}" if self._prefix else key
        raise RecipeError("recipe", f"{name} of {self._where} to be {expected}", got, remedy)

    def table(self, key: str, known: Any) -> _Table | None:
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
            self.refuse(key, f"one of {', '.join(allowed)}", got, "choose one of them")
        return str(value)

    def one_of(self, key: str, allowed: tuple[int, ...]) -> int | None:
        value = self._values.get(key)
        if value is not None and (isinstance(value, bool) or value not in allowed):
            self.refuse(key, f"one of {', '.join(map(str, allowed))}", repr(value), "choose one of them")
        return None if value is None else int(value)

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.refuse(key, f"a number from {least:g} to {most:g}", repr(value), "give one")
        if not least <= value <= most:
            self.refuse(key, f"from {least:g} to {most:g}", repr(value), "give one within")
        return float(value)

    def integer(self, key: str, least: int, most: int) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most}", repr(value), "give one")
        return int(value)
