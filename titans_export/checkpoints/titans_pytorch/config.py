"""The constructor's arguments as JSON: read, and each checked by itself.

Memory arguments inside a transformer's neural_memory_kwargs get that name and a dot in front, so that every argument
has one key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...errors import CheckpointError

Kind = Literal["transformer", "memory"]
NetworkKind = Literal["mlp", "gated-residual", "factorized", "swiglu"]
CLASSES: dict[Kind, str] = {"transformer": "MemoryAsContextTransformer", "memory": "NeuralMemory"}
BUILT_IN = ("train_mac",)
KWARGS = "neural_memory_kwargs"
ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "sigmoid")
ATTENTION_REFUSED = (
    "a memory network that maps each token by itself",
    "MemoryAttention, which in decoding attends over one token and in training over a chunk",
    "train with MemoryMLP or another of the library's networks: no stream can equal what this one was trained as",
)


MOST = 1 << 20  # of sizes and counts; longer segments have no schedule
SMALLEST, LARGEST = 1e-30, 1e30  # of numbers


class Argument(NamedTuple):
    """What a value must be, in words and as a test."""

    what: str
    holds: Callable[[Any], bool]


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= MOST


def _number(value: Any) -> bool:
    """What float32 holds, and 0: kernels compute in it."""
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
DEFAULT_NETWORK = {"depth": 2, "expansion_factor": 4.0}  # NeuralMemory's default_model_kwargs


@dataclass(frozen=True)
class Config:
    """The arguments that were given. name: what errors call the file. given: by key, all of them valid."""

    name: str
    json: dict[str, Any]
    given: dict[str, Any]


def correct(expected: str, got: str, name: str) -> CheckpointError:
    return CheckpointError("config", expected, got, f"correct {name}")


def load(config: Path | str | None) -> tuple[str, dict[str, Any]]:
    """Name and contents of the file, or of what is built in under that name; nothing for None."""
    if config is None:
        return "the arguments (--config)", {}
    if str(config) in BUILT_IN:
        path, name = Path(__file__).parent / f"{config}.json", str(config)
    else:
        path, name = Path(config), Path(config).name
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        built_in = ", ".join(BUILT_IN)
        raise CheckpointError(
            "config", f"a file {path}", "none", f"write the constructor's arguments there as JSON, or give {built_in}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError("config", f"JSON in {path}", str(error), "correct it") from None
    if not isinstance(read, dict):
        raise correct(f"an object of the constructor's arguments in {name}", type(read).__name__, name)
    return name, read


def check_version(version: Any, name: str) -> None:
    if not isinstance(version, str) or not re.fullmatch(r"0\.5(\.\w+)*", version):
        raise CheckpointError(
            "config",
            f"titans-pytorch 0.5 as the version in {name}",
            json.dumps(version),
            "train with version 0.5: other versions compute something else",
        )


def parse(kind: Kind, name: str, contents: dict[str, Any]) -> Config:
    """Checks every argument by itself, and the combinations of which the library's constructor says no."""
    read = dict(contents)
    if read.pop("class", CLASSES[kind]) != CLASSES[kind]:
        raise correct(
            f"class {CLASSES[kind]}, whose tensors these are", f"{json.dumps(contents['class'])} in {name}", name
        )
    check_version(read.pop("version", "0.5"), name)
    if kind == "memory":
        given = _check(read, _MEMORY_ONLY | _MEMORY, "", name)
    else:
        given = _check(read, _TRANSFORMER, "", name)
        for key, value in given.pop(KWARGS, {}).items():
            if key in _MEMORY_ONLY:
                raise correct(f"{key} outside of {KWARGS}, as the transformer sets it", f"it in {name}", name)
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
            hint = f"; perhaps {near[0]} is meant" if near else ""
            raise correct(f"the constructor's arguments in {name}", f"{prefix}{key}{hint}", name)
        if key in _CUSTOM and value is not None:
            raise CheckpointError(
                "config",
                f"{_CUSTOM[key]}: no {prefix}{key}, or null",
                f"{json.dumps(value)} in {name}",
                "train with the library's own: code of one's own is not in the tensors",
            )
        what, holds = arguments[key]
        if not holds(value):
            raise correct(f"{prefix}{key} to be {what}", f"{json.dumps(value)} in {name}", name)
        if key == "activation" and value is not None:
            value = activation_name(value)
        if isinstance(value, list) and key == "chunk_size":
            if value[0] != value[1]:
                raise correct("one chunk_size", f"{value} in {name}, on which the library itself fails", name)
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
            raise CheckpointError("config", *ATTENTION_REFUSED)
        if named not in NETWORKS:
            raise CheckpointError(
                "config",
                f"type in {key} to be one of {', '.join(NETWORKS)}",
                f"{json.dumps(named)} in {config.name}",
                "a memory module of one's own is code, which is not in the tensors; train with one of these",
            )
        takes = {"type": IGNORED, "dim": POSITIVE, "depth": POSITIVE, NETWORKS[named].width: ABOVE_ZERO}
        takes = {name: numbers.get(name, IGNORED) for name in takes}
        _check(spec, takes, f"{key}.", config.name)
    kwargs_key = "default_model_kwargs" if kind == "memory" else f"{KWARGS}.default_model_kwargs"
    if (kwargs := config.given.get(kwargs_key)) is not None:
        takes = {name: numbers[name] for name in ("depth", "expansion_factor")}
        _check(kwargs, takes, f"{kwargs_key}.", config.name)


def _check_combinations(config: Config, memory: str) -> None:
    """On these the library's constructor fails, so no checkpoint can have them."""
    given, name = config.given, config.name
    dim_head, dim = given.get(f"{memory}dim_head"), given.get("dim")
    if given.get(f"{memory}heads") == 1 and None not in (dim_head, dim) and dim_head != dim:
        raise correct(
            f"{memory}dim_head to be dim, {dim}, where {memory}heads is 1",
            f"{dim_head} in {name}, on which the library itself fails",
            name,
        )
    if given.get(f"{memory}learned_momentum_combine"):
        order = given.get(f"{memory}momentum_order")
        if given.get(f"{memory}momentum") is False or order == 1:
            raise correct(
                f"{memory}momentum of order 2 or more with learned_momentum_combine",
                f"order {order} in {name}, on which the library itself fails"
                if order == 1
                else f"none in {name}, on which the library itself fails",
                name,
            )
