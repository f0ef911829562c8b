"""A checkpoint or a live module of titans-pytorch as validated options and checked tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...model.titans_pytorch.options import MemoryOptions, TransformerOptions
from ...named_tensors import NamedTensors
from ..checkpoint import LoadOptions, Origin
from ..weights import Weights, open_weights
from . import config as arguments
from .config import CLASSES, Kind
from .infer import find_kind
from .layout import Shapes, memory_shapes, transformer_shapes
from .resolve import resolve_memory, resolve_transformer
from .shared import restore_shared
from .tensors import check_layout, checked

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclass(frozen=True)
class Source:
    """What a model is built from.

    tensors: float32, read at each access, named as in the library's state_dict(), without the dead copies
    memory_model.*. config: the arguments as they were given. library_defaults: arguments that were filled in.
    """

    kind: Kind
    options: TransformerOptions | MemoryOptions
    tensors: NamedTensors
    weights_sha256: str
    config: dict[str, Any]
    library_defaults: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    tokenizer: Path | None = None
    release: Callable[[], None] = lambda: None  # frees what was read of the file


def read(path: Path, config: Path | str | None, options: LoadOptions | None = None) -> Source:
    """Reads weights with the constructor's arguments: a JSON file, or "train_mac". Raises CheckpointError.

    Without `config`, a folder's config.json has the arguments.
    """
    path, options = Path(path), options or LoadOptions()
    if config is not None:
        name, contents = arguments.load(config)
        weights = open_weights(path, options.weights)
    else:
        weights = open_weights(path, options.weights)
        beside = weights.beside(CONFIG) if path.is_dir() else None
        name, contents = arguments.load(beside)
    memory = contents.get(arguments.KWARGS, contents)
    per_head = isinstance(memory, dict) and memory.get("per_head_learned_parameters") is True
    tensors = restore_shared(weights.tensors, per_head)
    source = assemble(
        name,
        contents,
        tensors,
        weights.sha256,
        options.library_defaults,
        _saved_arguments(weights),
    )
    origin = Origin.of(weights, weights.tensors, source.library_defaults)
    tokenizer = weights.beside(TOKENIZER) if source.kind == "transformer" else None
    return replace(source, origin=origin, tokenizer=tokenizer, release=weights.release)


def _saved_arguments(weights: Weights) -> dict[str, Any]:
    """Plain values that a trainer saved under names such as hyper_parameters."""
    saved: dict[str, Any] = {}
    for key in ("args", "config", "hparams", "hyper_parameters"):
        values = weights.extras.get(key)
        if isinstance(values, dict):
            saved |= {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return saved


def assemble(
    name: str,
    contents: dict[str, Any],
    tensors: Mapping[str, Tensor],
    digest: str,
    library_defaults: bool = False,
    saved: Mapping[str, Any] | None = None,
) -> Source:
    """Options and checked tensors.

    name: what errors call the arguments. saved: values of the training, which only errors name, because a training's
    batch_size or heads need not be the memory's.
    """
    named = NamedTensors.of(tensors)
    shapes = named.shapes
    kind = find_kind(shapes)
    config = replace(arguments.parse(kind, name, contents), library_defaults=library_defaults, saved=saved or {})
    options: TransformerOptions | MemoryOptions
    expected: Shapes
    if kind == "transformer":
        options, first = resolve_transformer(config, shapes)
        expected = transformer_shapes(options, first)
    else:
        options = resolve_memory(config, shapes)
        expected = memory_shapes(options)
    check_layout(shapes, expected, CLASSES[kind])
    return Source(kind, options, checked(named, expected), digest, contents, config.filled)
