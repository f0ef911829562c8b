"""The project's own checkpoint format: weights at any path that `weights` reads, with a `config.json`.

Tensor names are the parameter names of `titans_export.model.Titans`. A tokenizer.json beside them becomes part of the
bundle. `save` writes a folder with `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, UsageError
from ..files import replacing_file
from ..model import ModelConfig, Titans, parse_config, read_config
from ..named_tensors import NamedTensors
from .checkpoint import Checkpoint, LoadOptions, Origin, check_values
from .weights import Weights, open_weights

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def _check(tensors: NamedTensors, model: Titans, path: Path) -> None:
    wanted = model.state_dict()
    fix = "check config.json against it"
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError("E0304", "checkpoint", f"{path} has no tensor {missing[0]!r}", fix)
    if unknown := sorted(set(tensors) - set(wanted)):
        problem = f"{path} has a tensor that the model lacks: {unknown[0]!r}"
        raise CheckpointError("E0304", "checkpoint", problem, fix)
    for name, shape in sorted(tensors.shapes.items()):
        if (expected := tuple(wanted[name].shape)) != shape:
            problem = f"{name} has another shape than the configuration gives: expected {list(expected)}"
            raise CheckpointError("E0304", "checkpoint", f"{problem}, got {list(shape)}", fix)
    check_values(tensors)


class _Uninitialised(TorchFunctionMode):
    """A context in which new parameters have no random values, as they are overwritten."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class TitansCheckpoint(Checkpoint):
    """A checkpoint of this format."""

    model: Titans


def load(path: Path, options: LoadOptions | None = None) -> TitansCheckpoint:
    """Loads the weights at `path`, a folder or a file, with the config.json there. Raises CheckpointError.

    float16 and bfloat16 become float32, as the model computes.
    """
    options = options or LoadOptions()
    weights, config = _find(path, options)
    with torch.device("meta"):  # shapes first: a wrong size in the configuration must not allocate it
        _check(weights.tensors, Titans(config), path)
    with _Uninitialised():
        model = Titans(config)
    with torch.no_grad():
        values = model.state_dict()
        for name, value in weights.tensors.float32().items():
            values[name].copy_(value)
    weights.release()
    return TitansCheckpoint(
        model.eval(), "titans", weights.sha256, weights.beside(TOKENIZER), origin=Origin.of(weights, weights.tensors)
    )


def _find(path: Path, options: LoadOptions) -> tuple[Weights, ModelConfig]:
    """The weights, and the configuration: the given file, or the one beside them."""
    if options.config is not None:
        return open_weights(path, options.weights), read_config(Path(options.config))
    if path.is_dir() and (path / CONFIG).is_file():
        config = read_config(path / CONFIG)  # first, as it is quick
        return open_weights(path, options.weights), config
    weights = open_weights(path, options.weights)
    beside = weights.beside(CONFIG)
    if beside is None and (saved := _saved_config(weights.extras)) is not None:
        return weights, parse_config(saved)
    return weights, read_config(beside or (path if path.is_dir() else path.parent) / CONFIG)


def _saved_config(extras: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of a config.json that a trainer saved beside the weights, or None."""
    inner = extras.get("hyper_parameters")
    for values in (extras.get("config"), inner, inner.get("config") if isinstance(inner, dict) else None):
        if isinstance(values, dict) and values.get("format") == "titans":
            return values
    return None


def load_with(path: Path, options: LoadOptions) -> Checkpoint:
    """`load`, but raises UsageError for options that this format lacks."""
    if options.bug_compatible is not None:
        raise UsageError("E0102", "checkpoint", "--format titans has no --bug-compatible", "leave out --bug-compatible")
    if options.library_defaults:
        raise UsageError("E0102", "checkpoint", "--format titans has no --library-defaults", "leave it out")
    return load(path, options)


def save(model: Titans, path: Path) -> None:
    """Writes the model to the folder `path`. Each file is renamed into place atomically."""
    path.mkdir(parents=True, exist_ok=True)
    with replacing_file(path / WEIGHTS) as aside:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, aside)
    with replacing_file(path / CONFIG) as aside:
        aside.write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
