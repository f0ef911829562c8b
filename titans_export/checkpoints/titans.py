"""The project's own checkpoint format: a folder with `config.json` and `model.safetensors`, float32.

Tensor names are the parameter names of `titans_export.model.Titans`. A tokenizer.json beside them becomes part of the
bundle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, MissingCheckpointError, UsageError
from ..files import replacing_file
from ..model import Titans, read_config
from .checkpoint import Checkpoint, LoadOptions

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MissingCheckpointError(
            "E0301", "checkpoint", f"no such file: {path}", "give a folder that holds it"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "E0302", "checkpoint", f"damaged file {path}: {error}", "copy or train it again"
        ) from None


def _check(tensors: dict[str, torch.Tensor], model: Titans, path: Path) -> None:
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError(
            "E0304", "checkpoint", f"{path} has no tensor {missing[0]!r}", "check config.json against it"
        )
    if unknown := sorted(set(tensors) - set(wanted)):
        problem = f"{path} has a tensor that the model lacks: {unknown[0]!r}"
        raise CheckpointError("E0304", "checkpoint", problem, "check config.json against it")
    for name, value in sorted(tensors.items()):
        shape, expected = list(value.shape), list(wanted[name].shape)
        if shape != expected:
            problem = f"{name} has another shape than config.json gives: expected {expected}, got {shape}"
            raise CheckpointError("E0304", "checkpoint", problem, "check config.json against the weights")
        if value.dtype != torch.float32:
            problem = f"wrong dtype of {name}: expected float32, got {str(value.dtype).removeprefix('torch.')}"
            raise CheckpointError("E0306", "checkpoint", problem, "convert the weights")
        if not torch.isfinite(value).all():
            raise CheckpointError("E0307", "checkpoint", f"NaN or infinity in {name}", "use an earlier checkpoint")


@dataclass(frozen=True)
class TitansCheckpoint(Checkpoint):
    """A checkpoint of this format."""

    model: Titans


def load(path: Path) -> TitansCheckpoint:
    """Loads the folder at `path`. Raises CheckpointError."""
    if not path.is_dir():
        problem = f"not a folder: {path}" if path.exists() else f"no such folder: {path}"
        raise MissingCheckpointError("E0301", "checkpoint", problem, "give the folder that holds config.json")
    config = read_config(path / CONFIG)
    tensors = _read_tensors(path / WEIGHTS)
    with torch.device("meta"):  # shapes first: a wrong size in the configuration must not allocate it
        _check(tensors, Titans(config), path / WEIGHTS)
    model = Titans(config)
    model.load_state_dict(tensors)
    digest = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    tokenizer = path / TOKENIZER
    return TitansCheckpoint(model.eval(), "titans", digest, tokenizer if tokenizer.is_file() else None)


def load_with(path: Path, options: LoadOptions) -> Checkpoint:
    """`load` with options. Raises UsageError for options that this format lacks."""
    if options.config is not None:
        raise UsageError("E0102", "checkpoint", "--format titans has no --config", "leave out --config")
    if options.bug_compatible is not None:
        raise UsageError("E0102", "checkpoint", "--format titans has no --bug-compatible", "leave out --bug-compatible")
    return load(path)


def save(model: Titans, path: Path) -> None:
    """Writes the model to the folder `path`. Each file is renamed into place atomically."""
    path.mkdir(parents=True, exist_ok=True)
    with replacing_file(path / WEIGHTS) as aside:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, aside)
    with replacing_file(path / CONFIG) as aside:
        aside.write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
