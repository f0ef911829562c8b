"""The configuration of a Titans model, stored in `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .. import strict_json
from ..errors import CheckpointError, MissingCheckpointError
from .memory import ACTIVATIONS, MemorySpec

VARIANTS = ("lmm", "mac", "mag", "mal")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MemoryConfig:
    """One memory layer.

    heads, head_dim: memory networks per layer, and the width of their keys, values and queries.
    depth: 1 for a linear map, 2 or 3 for an MLP; expansion: hidden width / head_dim.
    chunk: tokens that share one gradient point. conv: width of the causal convolutions on q, k and v.
    step_limit: bounds the step size by step_limit (1 - momentum) / chunk. With unit keys and a linear memory, the
    update is a contraction for limits up to 1.
    """

    heads: int
    head_dim: int
    chunk: int
    depth: int = 1
    expansion: int = 2
    activation: str = "silu"
    residual: bool = False
    layer_norm: bool = False
    conv: int = 4
    step_limit: float = 1.0

    @property
    def spec(self) -> MemorySpec:
        hidden = (self.head_dim * self.expansion,) * (self.depth - 1)
        widths = (self.head_dim, *hidden, self.head_dim)
        return MemorySpec(widths, self.activation, self.residual, self.layer_norm, self.chunk)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    variant: "mac", "mag", "mal" or "lmm" (memory only). dim: width of the residual stream. layers: number of blocks.
    memory_layers: indices of the blocks with a memory, None for all.
    attention_heads: each of width dim / attention_heads.
    window: tokens that attention sees, including the current one: the sliding window of MAG and MAL, the segment of
    MAC.
    persistent: persistent tokens in front of every attention window.
    hidden: inner width of the feed-forward network.
    """

    variant: str
    vocab_size: int
    dim: int
    layers: int
    hidden: int
    memory: MemoryConfig
    memory_layers: tuple[int, ...] | None = None
    attention_heads: int = 0
    window: int = 0
    persistent: int = 0
    name: str = field(default="titans")

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str, got: object) -> None:
            if not ok:
                raise _invalid(name, expected, got)

        m = self.memory
        need(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", self.variant)
        for owner, names in (
            (self, ("vocab_size", "dim", "layers", "hidden")),
            (m, ("heads", "head_dim", "chunk", "expansion")),
        ):
            for name in names:
                need(getattr(owner, name) >= 1, name, "at least 1", getattr(owner, name))
        need(m.conv >= 2, "memory.conv", "at least 2", m.conv)
        need(m.depth in (1, 2, 3), "memory.depth", "1, 2 or 3", m.depth)
        need(m.activation in ACTIVATIONS, "memory.activation", f"one of {', '.join(ACTIVATIONS)}", m.activation)
        need(0 < m.step_limit < float("inf"), "memory.step_limit", "a positive finite number", m.step_limit)
        chosen = self.memory_layers
        if chosen is not None:
            inside = all(0 <= i < self.layers for i in chosen) and list(chosen) == sorted(set(chosen))
            need(inside, "memory_layers", f"increasing indices below {self.layers}", list(chosen))
        if self.variant == "lmm":
            unused = (self.attention_heads, self.window, self.persistent)
            need(unused == (0, 0, 0), "attention_heads, window, persistent", "0 for lmm, without attention", unused)
            return
        need(self.persistent >= 0, "persistent", "at least 0", self.persistent)
        need(self.window >= 2, "window", "at least 2", self.window)
        heads = self.attention_heads
        whole = heads >= 1 and self.dim % (2 * heads) == 0
        need(whole, "attention_heads", f"a number that divides dim, {self.dim}, into even sizes", heads)
        if self.variant == "mac":
            aligned = self.window % m.chunk == 0
            need(aligned, "window", f"a multiple of memory.chunk ({m.chunk}) for mac", self.window)

    def has_memory(self, layer: int) -> bool:
        return self.memory_layers is None or layer in self.memory_layers

    def to_json(self) -> dict[str, Any]:
        """The JSON form, including its format version."""
        return {"format": "titans", "format_version": FORMAT_VERSION, **asdict(self)}


_T = TypeVar("_T", MemoryConfig, ModelConfig)


def _invalid(name: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(
        "E0309", "config", f"invalid {name}: expected {expected}, got {got!r}", "correct config.json"
    )


def _build(kind: type[_T], values: Any, where: str) -> _T:
    """Builds a dataclass from a JSON object. Raises CheckpointError for unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise _invalid(where, "an object", values)
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise CheckpointError("E0309", "config", f"unknown key {unknown[0]!r} in {where}", "remove or correct it")
    if missing := sorted(set(known) - set(values)):
        raise CheckpointError("E0311", "config", f"no key {missing[0]!r} in {where}", "add it to config.json")
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
    for name, value in values.items():
        wanted = kinds.get(str(known[name].type))
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise _invalid(f"{where}.{name}", f"type {known[name].type}", value)
    return kind(**values)


def parse_config(values: Any) -> ModelConfig:
    """Parses the configuration from a JSON value. Raises CheckpointError for the first invalid key."""
    if not isinstance(values, dict):
        raise _invalid("config.json", "a JSON object", values)
    values = dict(values)
    version = values.pop("format_version", None)
    if values.pop("format", None) != "titans" or version != FORMAT_VERSION:
        raise CheckpointError(
            "E0313",
            "config",
            f'unsupported config.json: expected "format": "titans" and "format_version": {FORMAT_VERSION}, '
            f"got format_version {version!r}",
            "check that this is a Titans checkpoint; upgrade titans-export if it is newer",
        )
    if "memory" in values:
        values["memory"] = _build(MemoryConfig, values["memory"], "memory")
    layers = values.get("memory_layers")
    if layers is not None:
        if not isinstance(layers, list) or not all(type(i) is int for i in layers):
            raise _invalid("memory_layers", "a list of integers", layers)
        values["memory_layers"] = tuple(layers)
    return _build(ModelConfig, values, "the model")


def read_config(path: Path) -> ModelConfig:
    """Reads and checks config.json. Raises CheckpointError."""
    try:
        values = strict_json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingCheckpointError(
            "E0308", "config", f"no such file: {path}", "give a folder that holds config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("E0308", "config", f"{path} is not readable JSON: {error}", "restore the file") from None
    return parse_config(values)
