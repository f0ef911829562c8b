"""The project's own checkpoint format: a folder with `config.json` and `model.safetensors`, float32.

Tensor names are the parameter names of `titans_export.model.Titans`; a tokenizer.json beside them is taken along.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, UsageError
from ..files import replacing_file
from ..model import Titans, read_config
from .checkpoint import Checkpoint, LoadOptions

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError("checkpoint", f"a file {path}", "none", "give a folder that holds it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError("checkpoint", f"{path} to be whole", str(error), "copy or train it again") from None


def _check(tensors: dict[str, torch.Tensor], model: Titans, path: Path) -> None:
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError("checkpoint", f"tensor {missing[0]!r} in {path}", "none", "check config.json against it")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(
            "checkpoint",
            f"only the tensors of the model in {path}",
            f"{unknown[0]!r} too",
            "check config.json against it",
        )
    for name, value in sorted(tensors.items()):
        shape, expected = list(value.shape), list(wanted[name].shape)
        if shape != expected:
            raise CheckpointError(
                "checkpoint", f"{name} of shape {expected}", str(shape), "check config.json against the weights"
            )
        if value.dtype != torch.float32:
            raise CheckpointError("checkpoint", f"{name} in float32", str(value.dtype), "convert the weights")
        if not torch.isfinite(value).all():
            raise CheckpointError("checkpoint", f"{name} to be finite", "NaN or infinity", "use an earlier checkpoint")


@dataclass(frozen=True)
class TitansCheckpoint(Checkpoint):
    """A checkpoint of this format."""

    model: Titans


def load(path: Path) -> TitansCheckpoint:
    """Loads the folder at `path`. Raises CheckpointError naming what is missing or wrong."""
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise CheckpointError("checkpoint", f"a folder {path}", got, "give the folder that holds config.json")
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
    """`load`, refusing what this format does not have."""
    if options.config is not None:
        raise UsageError("checkpoint", "no --config with --format titans", options.config, "leave it out")
    if options.bug_compatible is not None:
        raise UsageError("checkpoint", "no --bug-compatible with --format titans", "one", "leave it out")
    return load(path)


def save(model: Titans, path: Path) -> None:
    """Writes the model to the folder `path`, which is created. Each file appears whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    with replacing_file(path / WEIGHTS) as aside:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, aside)
    with replacing_file(path / CONFIG) as aside:
        aside.write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
