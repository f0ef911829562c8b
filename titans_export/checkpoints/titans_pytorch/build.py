"""Builds the streaming model of a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError, UsageError
from ...model import StreamModel
from ...model.titans_pytorch.loading import load_memory, load_transformer
from ...model.titans_pytorch.options import TransformerOptions
from ...model.titans_pytorch.transformer import MemoryAsContext
from ...model.titans_pytorch.vectors import VectorMemory
from ..checkpoint import Checkpoint, LoadOptions
from .library import library_oracle
from .live import from_module
from .source import Source, read

if TYPE_CHECKING:
    from torch import nn

FORMAT = "titans-pytorch"


def _model(source: Source, name: str, bug_compatible: int | None) -> StreamModel:
    options = source.options
    if isinstance(options, TransformerOptions):
        transformer = MemoryAsContext(options, name, bug_compatible)
        load_transformer(transformer, source.tensors)
        return transformer
    if bug_compatible is not None:
        problem = "--bug-compatible is for transformers, and the checkpoint is a NeuralMemory"
        raise UsageError("E0102", "checkpoint", problem, "leave it out")
    if options.accept_weight_residual:
        problem = "the NeuralMemory needs the weights of a previous layer (accept_weight_residual)"
        raise CheckpointError("E0312", "checkpoint", problem, "export the transformer that it belongs to")
    memory = VectorMemory(options, name)
    load_memory(memory.layer, source.tensors)
    return memory


def _checkpoint(source: Source, name: str, bug_compatible: int | None) -> Checkpoint:
    if bug_compatible is not None and bug_compatible < 1:
        problem = f"invalid --bug-compatible: expected a prompt of at least 1 token, got {bug_compatible}"
        raise UsageError("E0104", "checkpoint", problem, "give the length of the prompt")
    # What the library trains; what it decodes differs, which is the point of bug_compatible.
    oracle = None if bug_compatible is not None else partial(library_oracle, source)
    model = _model(source, name, bug_compatible).eval()
    return Checkpoint(model, FORMAT, source.weights_sha256, source.tokenizer, oracle, source.origin)


def load(path: Path, options: LoadOptions) -> Checkpoint:
    """Loads weights at any path, with the arguments in `options.config`. Raises CheckpointError."""
    source = read(path, options.config, options)
    checkpoint = _checkpoint(source, path.stem, options.bug_compatible)
    source.release()
    return checkpoint


def from_live(module: nn.Module, name: str = "titans-pytorch", bug_compatible: int | None = None) -> Checkpoint:
    """The checkpoint of a live MemoryAsContextTransformer or NeuralMemory."""
    return _checkpoint(from_module(module), name, bug_compatible)
