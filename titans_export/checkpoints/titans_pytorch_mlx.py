"""Checkpoints of Aedelon's titans-pytorch-mlx, its PyTorch side: docs/titans-pytorch-mlx.md says which.

Weights are a state dict, in a file of torch.save or of safetensors; files of torch.save are read with weights_only, so
that nothing in them runs. The configuration stands inside, as training scripts leave it, or in a
config.json beside, unless a file is given.
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

from ..errors import CheckpointError, UsageError
from ..model.titans_pytorch_mlx.loading import library_shapes, load_tensors
from ..model.titans_pytorch_mlx.model import SegmentModel
from ..model.titans_pytorch_mlx.options import VARIANTS, ModelOptions
from .checkpoint import Checkpoint, LoadOptions

FORMAT = "titans-pytorch-mlx"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
COMPILED = "_orig_mod."  # in front of every name once torch.compile had the model
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
# What its training scripts give to it; the rest of their configuration is about the training.
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
        raise CheckpointError(
            "config",
            f"the configuration in the checkpoint, or a file {path}",
            "neither",
            'write it, with "model_type" and "titans_config"',
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("config", f"{path} to be readable JSON", str(error), "restore the file") from None


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError("checkpoint", f"a file or folder {path}", "nothing", "check the path")
        return path
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if len(found) != 1:
        got = " and ".join(file.name for file in found) or "none"
        raise CheckpointError(
            "checkpoint", f"one of {', '.join(WEIGHTS)} in {path}", got, "give the path of the file itself"
        )
    return found[0]


def _read_weights(path: Path) -> dict[str, Any]:
    """What the file holds: a state dict, or a training checkpoint around one."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            "checkpoint", f"{path} to hold nothing but tensors and plain values", "other objects, which were not run",
            "save its state dict with the library's convert_checkpoint_to_hub_format",
        ) from None  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError("checkpoint", f"{path} to be whole", reason, "copy or train it again") from None
    if not isinstance(held, dict):
        raise CheckpointError("checkpoint", f"a dictionary in {path}", type(held).__name__, "save the state dict")
    return held


def _need(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise CheckpointError("config", expected, repr(got), REPAIR)


def _model_type(value: object) -> str:
    if value == "mac":
        raise CheckpointError(
            "config",
            f"a model_type that runs as a stream, one of {', '.join(VARIANTS)}",
            "'mac', whose logits depend on later tokens of their segment",
            "export one of these, or train mac with another library: docs/titans-pytorch-mlx.md says why",
        )
    _need(value in VARIANTS, f"model_type to be one of {', '.join(VARIANTS)}", value)
    return str(value)


def _parse(model_type: object, config: object) -> ModelOptions:
    """config: the fields of TitansConfig, or those of a training script, which has model_type among them."""
    _need(isinstance(config, dict), "the model's configuration to be an object", type(config).__name__)
    assert isinstance(config, dict)
    if "model_type" in config:
        model_type = config["model_type"] if model_type is None else model_type
        for name in TRAINED_WITH:
            _need(name in config, f"key {name!r} in the training configuration", "none")
        config = {name: config[name] for name in TRAINED_WITH}
    variant = _model_type(model_type)
    for name in config:
        _need(name in DEFAULTS, "the fields of TitansConfig only", f"unknown field {name}")
    values = {**DEFAULTS, **config}
    for name, value in values.items():
        wanted = type(DEFAULTS[name])
        number = wanted is float and type(value) is int
        _need(type(value) is wanted or number, f"{name} to be of type {wanted.__name__}", value)
        _need(not isinstance(value, float) or math.isfinite(value), f"{name} to be finite", value)
    for name in (*TRAINED_WITH, "conv_kernel_size"):
        least = 0 if name == "num_persistent_tokens" else 1
        _need(values[name] >= least, f"{name} to be at least {least}", values[name])
    dim, heads, depth = values["dim"], values["num_heads"], values["num_memory_layers"]
    _need(dim % heads == 0, f"dim to be a multiple of num_heads ({heads})", dim)
    if values["use_rope"] and variant != "lmm":
        _need(dim // heads % 2 == 0, "dim / num_heads to be even, as use_rope is set", dim // heads)
    _need(
        values["activation"] in ACTIVATIONS, f"activation to be one of {', '.join(ACTIVATIONS)}", values["activation"]
    )
    _need(0 < values["memory_lr"] <= 1, "memory_lr to be in (0, 1]", values["memory_lr"])
    _need(0 <= values["memory_momentum"] < 1, "memory_momentum to be in [0, 1)", values["memory_momentum"])
    widths = {name: int(dim * values[name]) for name in ("ffn_mult", "memory_hidden_mult")}
    for name, width in widths.items():
        _need(width >= 1, f"{name} to give a width of at least 1", values[name])
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
    """From the file that is given, else from the checkpoint itself, else from the file beside it."""
    if "config" in held and given is None:
        return _parse(held.get("model_type"), held["config"])
    path = beside if given is None else Path(given)
    values = _read_json(path)
    whole = isinstance(values, dict) and {"model_type", "titans_config"} <= set(values)
    _need(whole, f'an object with "model_type" and "titans_config" in {path}', values)
    return _parse(values["model_type"], values["titans_config"])


def _state_dict(held: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The model's tensors under the names of a model that was not compiled."""
    found = held.get("model_state_dict", held)
    if not isinstance(found, dict):
        raise CheckpointError(
            "checkpoint", f"model_state_dict in {path} to be a dictionary", type(found).__name__, "save the state dict"
        )
    tensors = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                "checkpoint", f"a state dict in {path}", f"{name!r}, which is a {type(value).__name__}",
                "save the model's state_dict(), or a dictionary that has it as model_state_dict",
            )  # fmt: skip
        tensors[str(name).removeprefix(COMPILED)] = value
    return tensors


def _check(tensors: dict[str, Tensor], options: ModelOptions, path: Path) -> None:
    wanted = library_shapes(options)
    remedy = "check the configuration against the weights"
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError("checkpoint", f"tensor {missing[0]!r} in {path}", "none", remedy)
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError("checkpoint", f"only the tensors of the model in {path}", f"{unknown[0]!r} too", remedy)
    for name, value in sorted(tensors.items()):
        shape, expected = list(value.shape), list(wanted[name])
        if shape != expected:
            raise CheckpointError("checkpoint", f"{name} of shape {expected}", str(shape), remedy)
        if not value.is_floating_point():
            raise CheckpointError("checkpoint", f"{name} to hold floats", str(value.dtype), "convert the weights")
        if not torch.isfinite(value).all():
            raise CheckpointError("checkpoint", f"{name} to be finite", "NaN or infinity", "use an earlier checkpoint")


def load(path: Path, options: LoadOptions | None = None) -> Checkpoint:
    """Loads the file of weights at `path`, or the folder that holds one. Weights of other float types become float32,
    as the library's own loading makes them.

    Raises CheckpointError naming what is missing or wrong.
    """
    options = options or LoadOptions()
    if options.bug_compatible is not None:
        raise UsageError("checkpoint", f"no --bug-compatible with --format {FORMAT}", "one", "leave it out")
    file = _weights_file(path)
    held = _read_weights(file)
    config = _options(held, file.parent / CONFIG, options.config)
    tensors = _state_dict(held, file)
    head = tensors.pop("head.weight", None)
    _check(tensors, config, file)
    if head is not None and not torch.equal(head, tensors["embed.weight"]):
        raise CheckpointError(
            "checkpoint", "head.weight to be embed.weight, as the library ties them", "another", "train it tied"
        )
    model = SegmentModel(config)
    load_tensors(model, tensors)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    tokenizer = file.parent / TOKENIZER
    return Checkpoint(model.eval(), FORMAT, digest, tokenizer if tokenizer.is_file() else None)
