"""Checkpoints of Aedelon's titans-pytorch-mlx, its PyTorch side (docs/titans-pytorch-mlx.md).

The configuration is a given file, part of the checkpoint, or a config.json beside the weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .. import strict_json
from ..errors import CheckpointError, MissingCheckpointError, UsageError
from ..model.titans_pytorch_mlx.loading import library_shapes, load_tensors
from ..model.titans_pytorch_mlx.model import SegmentModel
from ..model.titans_pytorch_mlx.options import VARIANTS, ModelOptions
from ..named_tensors import NamedTensors
from .checkpoint import Checkpoint, LoadOptions, Origin, check_values
from .weights import Weights, open_weights

FORMAT = "titans-pytorch-mlx"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
HEAD, EMBEDDING = "head.weight", "embed.weight"
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
        return strict_json.loads(path.read_bytes(), plain=False)
    except FileNotFoundError:
        raise MissingCheckpointError(
            "E0308",
            "config",
            f"no configuration in the checkpoint and no file {path}",
            'write the file, with "model_type" and "titans_config"',
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("E0308", "config", f"{path} is not readable JSON: {error}", "restore the file") from None


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


def _options(weights: Weights, given: str | None) -> ModelOptions:
    """The options from the given file, else from the checkpoint, else from the file beside it."""
    held = weights.extras
    if "config" not in held and isinstance(held.get("hyper_parameters"), dict):
        held = held["hyper_parameters"]
    if "config" in held and given is None:
        return _parse(held.get("model_type"), held["config"])
    beside = weights.beside(CONFIG) or weights.files[0].parent / CONFIG
    path = beside if given is None else Path(given)
    values = _read_json(path)
    whole = isinstance(values, dict) and {"model_type", "titans_config"} <= set(values)
    _need(whole, f"configuration {path}", 'an object with "model_type" and "titans_config"', values)
    return _parse(values["model_type"], values["titans_config"])


def _check(tensors: NamedTensors, options: ModelOptions, path: Path) -> None:
    wanted = library_shapes(options)
    fix = "check the configuration against the weights"
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError("E0304", "checkpoint", f"{path} has no tensor {missing[0]!r}", fix)
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError("E0304", "checkpoint", f"{path} has a tensor that the model lacks: {unknown[0]!r}", fix)
    for name, shape in sorted(tensors.shapes.items()):
        if shape != (expected := wanted[name]):
            problem = f"{name} has another shape than the configuration gives: expected {list(expected)}"
            raise CheckpointError("E0304", "checkpoint", f"{problem}, got {list(shape)}", fix)
    check_values(tensors)


def load(path: Path, options: LoadOptions | None = None) -> Checkpoint:
    """Loads the weights at `path`. Converts them to float32, as the library.

    Raises CheckpointError.
    """
    options = options or LoadOptions()
    for name, value in (("--bug-compatible", options.bug_compatible), ("--library-defaults", options.library_defaults)):
        if value not in (None, False):
            raise UsageError("E0102", "checkpoint", f"--format {FORMAT} has no {name}", "leave it out")
    weights = open_weights(path, options.weights)
    config = _options(weights, options.config)
    tensors = weights.tensors
    if HEAD in tensors and EMBEDDING not in tensors:  # of two names of one tensor, some trainers save only one
        tensors = tensors.select({EMBEDDING if name == HEAD else name: name for name in tensors})
    tied = tensors.select({name: name for name in tensors if name != HEAD})
    _check(tied, config, path)
    if HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        problem = f"{HEAD} differs from {EMBEDDING}, which the library ties"
        raise CheckpointError("E0304", "checkpoint", problem, "train the model with tied weights")
    model = SegmentModel(config)
    load_tensors(model, tied.float32())
    weights.release()
    tokenizer = weights.beside(TOKENIZER)
    return Checkpoint(model.eval(), FORMAT, weights.sha256, tokenizer, origin=Origin.of(weights, tied))
