"""A checkpoint or a live module of titans-pytorch as validated options and checked tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...model.titans_pytorch.options import MemoryOptions, TransformerOptions
from . import config as arguments
from .config import CLASSES, Kind
from .infer import find_kind
from .layout import Shapes, memory_shapes, transformer_shapes
from .resolve import resolve_memory, resolve_transformer
from .tensors import Tensors, check_layout, checked, read_tensors, shapes_of


@dataclass(frozen=True)
class Source:
    """What a model is built from.

    tensors: float32, named as in the library's state_dict(), without the dead copies memory_model.*. config: the
    arguments as they were given.
    """

    kind: Kind
    options: TransformerOptions | MemoryOptions
    tensors: Tensors
    weights_sha256: str
    config: dict[str, Any]


def read(path: Path, config: Path | str | None) -> Source:
    """Reads a state dict with the constructor's arguments: a JSON file, or "train_mac". Raises CheckpointError."""
    name, contents = arguments.load(config)
    tensors, digest = read_tensors(Path(path))
    return assemble(name, contents, tensors, digest)


def assemble(name: str, contents: dict[str, Any], tensors: Tensors, digest: str) -> Source:
    """Options and checked tensors. name: what errors call the arguments."""
    shapes = shapes_of(tensors)
    kind = find_kind(shapes)
    config = arguments.parse(kind, name, contents)
    options: TransformerOptions | MemoryOptions
    expected: Shapes
    if kind == "transformer":
        options, first = resolve_transformer(config, shapes)
        expected = transformer_shapes(options, first)
    else:
        options = resolve_memory(config, shapes)
        expected = memory_shapes(options)
    check_layout(shapes, expected, CLASSES[kind])
    return Source(kind, options, checked(tensors, expected), digest, contents)
