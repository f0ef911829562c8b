"""The structure of an operator's table, and the entries that both memory operators share."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError

DOMAIN, VERSION = "ai.titans", 1
REQUIRED: Final = object()  # the default of attributes that every node must have


@dataclass(frozen=True)
class Input:
    """An input. dtype: its element type. optional: a node may omit it regardless of the attributes."""

    name: str
    dtype: str = "float32"
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute. default: the value if a node omits it.

    label: the prefix of the value in a function body's name. flag: 0 or 1; the name has the label alone, or nothing.
    """

    name: str
    default: Any = REQUIRED
    label: str = ""
    flag: bool = False

    def word(self, value: Any) -> str:
        """The attribute's word in a function body's name; empty for a flag that is off."""
        if self.flag:
            return self.label if value else ""
        text = "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return self.label + text


@dataclass(frozen=True)
class Operator:
    """One operator of the domain: inputs and outputs in order, and attributes by name."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Attribute, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(entry.name for entry in self.inputs)

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the attributes that a node may omit."""
        return {entry.name: entry.default for entry in self.attributes if entry.default is not REQUIRED}

    def dtype(self, name: str) -> str:
        """The element type of an input."""
        return next(entry.dtype for entry in self.inputs if entry.name == name)

    def optional(self, present: Container[str]) -> list[str]:
        """The optional inputs among those present, in order."""
        return [entry.name for entry in self.inputs if entry.optional and entry.name in present]

    def operands(self, present: Container[str]) -> list[str]:
        """Input names in order: empty for absent ones, truncated after the last one present."""
        names = [name if name in present else "" for name in self.input_names]
        while names and not names[-1]:
            names.pop()
        return names

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that differ from their defaults."""
        defaults = self.defaults
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A node's attributes with defaults filled in. Raises UsageError for unknown or missing attributes."""
        known = [entry.name for entry in self.attributes]
        unknown = [name for name in values if name not in known]
        if unknown:
            problem = f"invalid attribute {unknown[0]}: known are {', '.join(known)}"
            raise UsageError("E0701", self.name, problem, "export the checkpoint again")
        full = {**self.defaults, **values}
        missing = [name for name in known if name not in full]
        if missing:
            raise UsageError("E0703", self.name, f"missing attribute: {missing[0]}", "export the checkpoint again")
        return {name: full[name] for name in known}

    def overload(self, values: Mapping[str, Any], sizes: Mapping[str, int], extras: list[str]) -> str:
        """The name of a function body: `update_aligned_b1_h4_t64_w32x32_silu_c64_learn`.

        sizes: by letter, such as b for B. extras: optional inputs and outputs. Attributes at their defaults are
        omitted.
        """
        given = self.given(values)
        words = {entry.name: entry.word(given[entry.name]) for entry in self.attributes if entry.name in given}
        if values.get("mode") == "read":
            del words["schedule"]  # has no effect there
        first = [words.pop(name) for name in ("mode", "schedule") if name in words]
        lengths = [f"{letter}{size}" for letter, size in sizes.items()]
        return "_".join(word for word in (*first, *lengths, *words.values(), *extras) if word)


# Inputs 0 to 12.
INPUTS = (
    Input("state"),
    Input("q"),
    Input("k"),
    Input("v"),
    Input("step_size"),
    Input("momentum"),
    Input("forget_gate"),
    Input("fill", "int64"),
    Input("learn", "bool", optional=True),
    Input("valid", "int64", optional=True),
    Input("slots", "int64", optional=True),
    Input("update_limit", optional=True),
    Input("norm_scale"),
)
OUTPUTS = ("y", "state_out", "stats")
STATE, STATE_OUT = 0, 1  # indices of the packed rows among inputs and outputs
NETWORK = (
    Attribute("schedule"),
    Attribute("widths", label="w"),
    Attribute("activation"),
    Attribute("residual", label="residual", flag=True),
    Attribute("layer_norm", label="norm", flag=True),
    Attribute("chunk_size", label="c"),
)
MEMORY_DTYPE = (
    Attribute("memory_dtype", "float32"),
    Attribute("rounding", "nearest"),
    Attribute("seed", 0, label="seed"),
)
