"""Checkpoints of Aedelon's titans-pytorch-mlx, its PyTorch side (docs/titans-pytorch-mlx.md).

Weights are a state dict in a file of torch.save or of safetensors. Files of torch.save are read with weights_only, so
that they cannot run code. The configuration is a given file, part of the checkpoint, or a config.json beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, MissingCheckpointError, UsageError
from ..model.titans_pytorch_mlx.loading import library_shapes, load_tensors
from ..model.titans_pytorch_mlx.model import SegmentModel
from ..model.titans_pytorch_mlx.options import VARIANTS, ModelOptions
from .checkpoint import Checkpoint, LoadOptions

FORMAT = "titans-pytorch-mlx"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
COMPILED = "_orig_mod."  # prefix of names after torch.compile
ACTIVATIONS = ("silu", "gelu", "relu")
REPAIR = "correct the configuration"

# The library's TitansConfig with its defaults.
DEFAULTS: dict[str, Any] = {
    "dim": 512,
    "num_heads": 8,
    "num_layers": 12,
    "ffn_mult": 4.0,
    "num_memory_layers": 2,
    "memory_hidden_mult": 4.0,
    "num_persistent_tokens": 16,
    "num_memory_tokens": 64,
    "chunk_size": 512,
    "window_size": 512,
    "dropout": 0.1,
    "use_conv": True,
    "conv_kernel_size": 4,
    "use_rope": True,
    "max_seq_len": 8192,
    "vocab_size": 32000,
    "memory_lr": 0.1,
    "memory_momentum": 0.9,
    "memory_decay": 0.01,
    "activation": "silu",
    "init_std": 0.02,
}
# Fields that its training scripts set; the rest of their configuration concerns the training.
TRAINED_WITH = (
    "dim",
    "num_heads",
    "num_layers",
    "vocab_size",
    "chunk_size",
    "window_size",
    "num_persistent_tokens",
    "num_memory_layers",
)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingCheckpointError(
            "E0308",
            "config",
            f"no configuration in the checkpoint and no file {path}",
            'write the file, with "model_type" and "titans_config"',
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("E0308", "config", f"{path} is not readable JSON: {error}", "restore the file") from None


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise MissingCheckpointError("E0301", "checkpoint", f"no such file or folder: {path}", "check the path")
        return path
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if len(found) != 1:
        got = " and ".join(file.name for file in found) or "none"
        raise MissingCheckpointError(
            "E0301",
            "checkpoint",
            f"no single file of weights in {path}: expected one of {', '.join(WEIGHTS)}, got {got}",
            "give the path of the file itself",
        )
    return found[0]


def _read_weights(path: Path) -> dict[str, Any]:
    """The file's contents: a state dict, or a training checkpoint around one."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            "E0303",
            "checkpoint",
            f"{path} has objects other than tensors and plain values (no code was run)",
            "save its state dict with the library's convert_checkpoint_to_hub_format",
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            "E0302", "checkpoint", f"damaged file {path}: {reason}", "copy or train it again"
        ) from None
    if not isinstance(held, dict):
        problem = f"{path} is not a state dict: expected a dictionary, got {type(held).__name__}"
        raise CheckpointError("E0303", "checkpoint", problem, "save the state dict")
    return held


def _need(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise CheckpointError("E0309", "config", f"invalid {name}: expected {expected}, got {got!r}", REPAIR)


def _model_type(value: object) -> str:
    if value == "mac":
        raise CheckpointError(
            "E0312",
            "config",
            "unsupported model_type 'mac': its logits depend on later tokens of their segment",
            f"export one of {', '.join(VARIANTS)}, or train mac with another library (docs/titans-pytorch-mlx.md)",
        )
    _need(value in VARIANTS, "model_type", f"one of {', '.join(VARIANTS)}", value)
    return str(value)


def _parse(model_type: object, config: object) -> ModelOptions:
    """`config`: the fields of TitansConfig, or those of a training script, with model_type among them."""
    _need(isinstance(config, dict), "configuration", "an object", type(config).__name__)
    assert isinstance(config, dict)
    if "model_type" in config:
        model_type = config["model_type"] if model_type is None else model_type
        for name in TRAINED_WITH:
            if name not in config:
                raise CheckpointError("E0311", "config", f"the training configuration has no {name!r}", REPAIR)
        config = {name: config[name] for name in TRAINED_WITH}
    variant = _model_type(model_type)
    for name in config:
        if name not in DEFAULTS:
            raise CheckpointError("E0309", "config", f"unknown field of TitansConfig: {name}", REPAIR)
    values = {**DEFAULTS, **config}
    for name, value in values.items():
        wanted = type(DEFAULTS[name])
        number = wanted is float and type(value) is int
        _need(type(value) is wanted or number, name, f"type {wanted.__name__}", value)
        _need(not isinstance(value, float) or math.isfinite(value), name, "a finite number", value)
    for name in (*TRAINED_WITH, "conv_kernel_size"):
        least = 0 if name == "num_persistent_tokens" else 1
        _need(values[name] >= least, name, f"at least {least}", values[name])
    dim, heads, depth = values["dim"], values["num_heads"], values["num_memory_layers"]
    _need(dim % heads == 0, "dim", f"a multiple of num_heads ({heads})", dim)
    if values["use_rope"] and variant != "lmm":
        _need(dim // heads % 2 == 0, "dim / num_heads", "an even number with use_rope", dim // heads)
    _need(values["activation"] in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", values["activation"])
    _need(0 < values["memory_lr"] <= 1, "memory_lr", "a number in (0, 1]", values["memory_lr"])
    _need(0 <= values["memory_momentum"] < 1, "memory_momentum", "a number in [0, 1)", values["memory_momentum"])
    widths = {name: int(dim * values[name]) for name in ("ffn_mult", "memory_hidden_mult")}
    for name, width in widths.items():
        _need(width >= 1, name, "a width of at least 1", values[name])
    return ModelOptions(
        variant=next(known for known in VARIANTS if known == variant),
        vocab_size=values["vocab_size"],
        dim=dim,
        layers=values["num_layers"],
        hidden=widths["ffn_mult"],
        segment=values["chunk_size"],
        memory_widths=(dim, *(widths["memory_hidden_mult"],) * (depth - 1), dim),
        activation=values["activation"],
        conv=values["conv_kernel_size"] if values["use_conv"] else 0,
        step_limit=float(values["memory_lr"]),
        momentum_limit=float(values["memory_momentum"]),
        heads=heads,
        window=values["window_size"],
        persistent=values["num_persistent_tokens"],
        rotary=values["use_rope"],
    )


def _options(held: dict[str, Any], beside: Path, given: str | None) -> ModelOptions:
    """The options from the given file, else from the checkpoint, else from the file beside it."""
    if "config" in held and given is None:
        return _parse(held.get("model_type"), held["config"])
    path = beside if given is None else Path(given)
    values = _read_json(path)
    whole = isinstance(values, dict) and {"model_type", "titans_config"} <= set(values)
    _need(whole, f"configuration {path}", 'an object with "model_type" and "titans_config"', values)
    return _parse(values["model_type"], values["titans_config"])


def _state_dict(held: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The model's tensors under the names of a model that was not compiled."""
    found = held.get("model_state_dict", held)
    if not isinstance(found, dict):
        problem = f"model_state_dict in {path} is not a state dict: expected a dictionary, got {type(found).__name__}"
        raise CheckpointError("E0303", "checkpoint", problem, "save the state dict")
    tensors = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                "E0303",
                "checkpoint",
                f"{path} is not a state dict: {name!r} is a {type(value).__name__}",
                "save the model's state_dict(), or a dictionary that has it as model_state_dict",
            )
        tensors[str(name).removeprefix(COMPILED)] = value
    return tensors


def _check(tensors: dict[str, Tensor], options: ModelOptions, path: Path) -> None:
    wanted = library_shapes(options)
    fix = "check the configuration against the weights"
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError("E0304", "checkpoint", f"{path} has no tensor {missing[0]!r}", fix)
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError("E0304", "checkpoint", f"{path} has a tensor that the model lacks: {unknown[0]!r}", fix)
    for name, value in sorted(tensors.items()):
        shape, expected = list(value.shape), list(wanted[name])
        if shape != expected:
            problem = f"{name} has another shape than the configuration gives: expected {expected}, got {shape}"
            raise CheckpointError("E0304", "checkpoint", problem, fix)
        if not value.is_floating_point():
            problem = f"wrong dtype of {name}: expected floats, got {value.dtype}"
            raise CheckpointError("E0306", "checkpoint", problem, "convert the weights")
        if not torch.isfinite(value).all():
            raise CheckpointError("E0307", "checkpoint", f"NaN or infinity in {name}", "use an earlier checkpoint")


def load(path: Path, options: LoadOptions | None = None) -> Checkpoint:
    """Loads the file of weights at `path`, or the folder that holds one. Converts weights to float32, as the library.

    Raises CheckpointError.
    """
    options = options or LoadOptions()
    if options.bug_compatible is not None:
        raise UsageError("E0102", "checkpoint", f"--format {FORMAT} has no --bug-compatible", "leave it out")
    file = _weights_file(path)
    held = _read_weights(file)
    config = _options(held, file.parent / CONFIG, options.config)
    tensors = _state_dict(held, file)
    head = tensors.pop("head.weight", None)
    _check(tensors, config, file)
    if head is not None and not torch.equal(head, tensors["embed.weight"]):
        problem = "head.weight differs from embed.weight, which the library ties"
        raise CheckpointError("E0304", "checkpoint", problem, "train the model with tied weights")
    model = SegmentModel(config)
    load_tensors(model, tensors)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    tokenizer = file.parent / TOKENIZER
    return Checkpoint(model.eval(), FORMAT, digest, tokenizer if tokenizer.is_file() else None)
