"""The constructor's arguments as JSON: read, and each checked by itself.

Memory arguments inside a transformer's neural_memory_kwargs get that name and a dot in front, so that every argument
has one key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ... import strict_json
from ...errors import CheckpointError, MissingCheckpointError

Kind = Literal["transformer", "memory"]
NetworkKind = Literal["mlp", "gated-residual", "factorized", "swiglu"]
CLASSES: dict[Kind, str] = {"transformer": "MemoryAsContextTransformer", "memory": "NeuralMemory"}
BUILT_IN = ("train_mac",)
KWARGS = "neural_memory_kwargs"
ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "sigmoid")
ATTENTION_REFUSED = (
    "unsupported memory network MemoryAttention: it attends over one token in decoding and over a chunk in training",
    "train with MemoryMLP or another of the library's networks, as no stream can reproduce this one",
)


MOST = 1 << 20  # maximum of sizes and counts; longer segments have no schedule
SMALLEST, LARGEST = 1e-30, 1e30  # range of numbers


class Argument(NamedTuple):
    """A description of valid values, and the test."""

    what: str
    holds: Callable[[Any], bool]


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= MOST


def _number(value: Any) -> bool:
    """A number that float32 can hold, as kernels compute in it."""
    return type(value) in (int, float) and (value == 0 or SMALLEST <= abs(value) <= LARGEST)


def _or_null(argument: Argument) -> Argument:
    return Argument(f"{argument.what} or null", lambda value: value is None or argument.holds(value))


def activation_name(value: str) -> str:
    """The lower-case name in "SiLU", "nn.SiLU" and "torch.nn.SiLU()"."""
    return re.sub(r"^(torch\.)?nn\.|\(\)$", "", value).lower()


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(POSITIVE.holds, value))


def _layers(value: Any) -> bool:
    return isinstance(value, list) and all(map(POSITIVE.holds, value))


POSITIVE = Argument(f"an integer in [1, {MOST}]", _integer(1))
COUNT = Argument(f"an integer in [0, {MOST}]", _integer(0))
FLAG = Argument("true or false", lambda value: isinstance(value, bool))
NUMBER = Argument("a finite number", _number)
ABOVE_ZERO = Argument("a finite number above 0", lambda value: _number(value) and value > 0)
NOT_NEGATIVE = Argument("a finite number of at least 0", lambda value: _number(value) and value >= 0)
OBJECT = Argument("an object", lambda value: isinstance(value, dict))
LAYERS = Argument("a list of layers, counted from 1", _layers)
CHUNK = Argument("a positive integer or a pair of them", lambda value: POSITIVE.holds(value) or _pair(value))
ACTIVATION = Argument(
    f"one of {', '.join(ACTIVATIONS)}", lambda value: isinstance(value, str) and activation_name(value) in ACTIVATIONS
)
IGNORED = Argument("anything", lambda value: True)  # chooses initial values or an implementation, or is never used

# What only the memory's own constructor takes, and what a transformer's neural_memory_kwargs take as well.
_MEMORY_ONLY = {
    "dim": POSITIVE,
    "chunk_size": CHUNK,
    "batch_size": _or_null(POSITIVE),
    "model": _or_null(OBJECT),
    "qkv_receives_diff_views": FLAG,
    "accept_weight_residual": FLAG,
}
_MEMORY = {
    "dim_head": _or_null(POSITIVE),
    "heads": POSITIVE,
    "default_step_transform_max_lr": NOT_NEGATIVE,
    "per_parameter_lr_modulation": FLAG,
    "max_mem_layer_modulation": NUMBER,
    "per_head_learned_parameters": FLAG,
    "attn_pool_chunks": FLAG,
    "momentum": FLAG,
    "momentum_order": POSITIVE,
    "learned_momentum_combine": FLAG,
    "learned_combine_include_zeroth": FLAG,
    "num_kv_per_token": POSITIVE,
    "pre_rmsnorm": FLAG,
    "post_rmsnorm": FLAG,
    "qk_rmsnorm": FLAG,
    "max_grad_norm": _or_null(ABOVE_ZERO),
    "activation": _or_null(ACTIVATION),
    "spectral_norm_surprises": FLAG,
    "gated_transition": FLAG,
    "mem_model_norm_add_residual": FLAG,
    "store_with_lookahead_value": FLAG,
    "default_model_kwargs": OBJECT,
    "store_memory_loss_fn": IGNORED,
    "adaptive_step_transform": IGNORED,
    "use_accelerated_scan": IGNORED,
    "init_adaptive_step_bias": IGNORED,
    "init_momentum_bias": IGNORED,
    "init_decay_bias": IGNORED,
}
_TRANSFORMER = {
    "num_tokens": POSITIVE,
    "dim": POSITIVE,
    "depth": POSITIVE,
    "segment_len": POSITIVE,
    "neural_memory_segment_len": _or_null(POSITIVE),
    "neural_mem_gate_attn_output": FLAG,
    "neural_memory_add_value_residual": IGNORED,
    "num_longterm_mem_tokens": COUNT,
    "num_persist_mem_tokens": COUNT,
    "neural_memory_batch_size": _or_null(POSITIVE),
    "neural_memory_qkv_receives_diff_views": FLAG,
    "dim_head": POSITIVE,
    "heads": POSITIVE,
    "ff_mult": ABOVE_ZERO,
    "num_residual_streams": POSITIVE,
    "neural_memory_model": _or_null(OBJECT),
    KWARGS: OBJECT,
    "neural_memory_layers": _or_null(LAYERS),
    "use_flex_attn": IGNORED,
    "sliding_window_attn": FLAG,
    "neural_mem_weight_residual": FLAG,
    "token_emb": IGNORED,
}
# A function cannot stand in JSON: only that it is the library's own, null, can.
_CUSTOM = {
    "store_memory_loss_fn": "the library's own loss",
    "adaptive_step_transform": "the library's own step transform",
    "token_emb": "the library's own token embedding",
}


class Network(NamedTuple):
    """A class of memory_models.py: the name in the options, which argument sets its width, and the defaults."""

    kind: NetworkKind
    width: str
    defaults: dict[str, Any]


NETWORKS = {
    "MemoryMLP": Network("mlp", "expansion_factor", {"expansion_factor": 2.0}),
    "GatedResidualMemoryMLP": Network("gated-residual", "expansion_factor", {"expansion_factor": 4.0}),
    "FactorizedMemoryMLP": Network("factorized", "k", {"k": 32}),
    "MemorySwiGluMLP": Network("swiglu", "expansion_factor", {"depth": 1, "expansion_factor": 4.0}),
}
_LIBRARY_FAILS = " (the library fails too)"
DEFAULT_NETWORK = {"depth": 2, "expansion_factor": 4.0}  # NeuralMemory's default_model_kwargs


@dataclass(frozen=True)
class Config:
    """The given arguments. name: the file's name in errors. given: valid values by key.

    library_defaults: whether missing arguments get the library's defaults. filled: those that did. saved: values that
    the checkpoint holds beside its tensors.
    """

    name: str
    json: dict[str, Any]
    given: dict[str, Any]
    library_defaults: bool = False
    filled: dict[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)


def correct(problem: str, name: str) -> CheckpointError:
    """The error of an argument that the file gives and the library could not have taken."""
    return CheckpointError("E0309", "config", problem, f"correct {name}")


def load(config: Path | str | None) -> tuple[str, dict[str, Any]]:
    """Name and contents of the file, or of the built-in configuration of that name; empty for None."""
    if config is None:
        return "the arguments (--config)", {}
    if str(config) in BUILT_IN:
        path, name = Path(__file__).parent / f"{config}.json", str(config)
    else:
        path, name = Path(config), Path(config).name
    try:
        read = strict_json.loads(path.read_bytes(), plain=False)
    except FileNotFoundError:
        built_in = ", ".join(BUILT_IN)
        raise MissingCheckpointError(
            "E0308",
            "config",
            f"no such file: {path}",
            f"write the constructor's arguments there as JSON, or give {built_in}",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError("E0308", "config", f"{path} is not readable JSON: {error}", "correct the file") from None
    if not isinstance(read, dict):
        problem = (
            f"{name} is not a configuration: expected an object of constructor arguments, got {type(read).__name__}"
        )
        raise correct(problem, name)
    return name, read


def check_version(version: Any, name: str) -> None:
    if not isinstance(version, str) or not re.fullmatch(r"0\.5(\.\w+)*", version):
        raise CheckpointError(
            "E0313",
            "config",
            f"unsupported version of titans-pytorch in {name}: expected 0.5, got {json.dumps(version)}",
            "train with version 0.5, as others compute something else",
        )


def parse(kind: Kind, name: str, contents: dict[str, Any]) -> Config:
    """Checks every argument by itself, and the combinations that the library's constructor refuses."""
    read = dict(contents)
    if read.pop("class", CLASSES[kind]) != CLASSES[kind]:
        problem = f"wrong class in {name}: expected {CLASSES[kind]} by the tensors, got {json.dumps(contents['class'])}"
        raise correct(problem, name)
    check_version(read.pop("version", "0.5"), name)
    if kind == "memory":
        given = _check(read, _MEMORY_ONLY | _MEMORY, "", name)
    else:
        given = _check(read, _TRANSFORMER, "", name)
        for key, value in given.pop(KWARGS, {}).items():
            if key in _MEMORY_ONLY:
                raise correct(f"{key} in {KWARGS} of {name}, which the transformer sets itself", name)
            given |= _check({key: value}, _MEMORY, f"{KWARGS}.", name)
    config = Config(name, contents, given)
    _check_network(config, kind)
    _check_combinations(config, "" if kind == "memory" else f"{KWARGS}.")
    return config


def _check(read: dict[str, Any], arguments: dict[str, Argument], prefix: str, name: str) -> dict[str, Any]:
    given = {}
    for key, value in read.items():
        if key not in arguments:
            near = difflib.get_close_matches(key, arguments, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise correct(f"unknown argument in {name}: {prefix}{key}{hint}", name)
        if key in _CUSTOM and value is not None:
            raise CheckpointError(
                "E0312",
                "config",
                f"unsupported {prefix}{key} in {name}: expected null, {_CUSTOM[key]}, got {json.dumps(value)}",
                "train with the library's own, as a checkpoint does not contain code",
            )
        what, holds = arguments[key]
        if not holds(value):
            raise correct(f"invalid {prefix}{key}: expected {what}, got {json.dumps(value)} in {name}", name)
        if key == "activation" and value is not None:
            value = activation_name(value)
        if isinstance(value, list) and key == "chunk_size":
            if value[0] != value[1]:
                raise correct(f"chunk_size in {name}: expected one size, got {value}{_LIBRARY_FAILS}", name)
            value = value[0]
        given[prefix + key] = value
    return given


def network_key(kind: Kind) -> str:
    return "model" if kind == "memory" else "neural_memory_model"


def _check_network(config: Config, kind: Kind) -> None:
    key = network_key(kind)
    spec = config.given.get(key)
    numbers = {"dim": POSITIVE, "depth": POSITIVE, "expansion_factor": ABOVE_ZERO, "k": POSITIVE}
    if spec is not None:
        named = spec.get("type")
        if named == "MemoryAttention":
            raise CheckpointError("E0312", "config", *ATTENTION_REFUSED)
        if named not in NETWORKS:
            raise CheckpointError(
                "E0312",
                "config",
                f"unsupported type of {key} in {config.name}: expected one of {', '.join(NETWORKS)}, "
                f"got {json.dumps(named)}",
                "train with one of these, as a checkpoint does not contain the code of another module",
            )
        takes = {"type": IGNORED, "dim": POSITIVE, "depth": POSITIVE, NETWORKS[named].width: ABOVE_ZERO}
        takes = {name: numbers.get(name, IGNORED) for name in takes}
        _check(spec, takes, f"{key}.", config.name)
    kwargs_key = "default_model_kwargs" if kind == "memory" else f"{KWARGS}.default_model_kwargs"
    if (kwargs := config.given.get(kwargs_key)) is not None:
        takes = {name: numbers[name] for name in ("depth", "expansion_factor")}
        _check(kwargs, takes, f"{kwargs_key}.", config.name)


def _check_combinations(config: Config, memory: str) -> None:
    """Refuses combinations for which the library's constructor fails."""
    given, name = config.given, config.name
    dim_head, dim = given.get(f"{memory}dim_head"), given.get("dim")
    if given.get(f"{memory}heads") == 1 and None not in (dim_head, dim) and dim_head != dim:
        problem = f"{memory}dim_head in {name}: expected dim, {dim}, as {memory}heads is 1, got {dim_head}"
        raise correct(problem + _LIBRARY_FAILS, name)
    if given.get(f"{memory}learned_momentum_combine"):
        order = given.get(f"{memory}momentum_order")
        if given.get(f"{memory}momentum") is False or order == 1:
            got = f"order {order}" if order == 1 else "no momentum"
            problem = f"{memory}learned_momentum_combine in {name}: expected momentum of order 2 or more, got {got}"
            raise correct(problem + _LIBRARY_FAILS, name)
