"""Models of titans-pytorch with every parameter away from its initial zero or one, and option sets that cover pairs."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
# Constructor and arguments beside the width.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp-1": ("MemoryMLP", {"depth": 1}),
    "mlp-2": ("MemoryMLP", {"depth": 2, "expansion_factor": 2}),
    "mlp-3": ("MemoryMLP", {"depth": 3, "expansion_factor": 1.5}),
    "mlp-4": ("MemoryMLP", {"depth": 4, "expansion_factor": 1.5}),
    "gated-residual": ("GatedResidualMemoryMLP", {"depth": 2, "expansion_factor": 1.5}),
    "factorized": ("FactorizedMemoryMLP", {"depth": 2, "k": 5}),
    "swiglu": ("MemorySwiGluMLP", {"depth": 2, "expansion_factor": 2.0}),
}
FUSED_NETWORKS = ("mlp-1", "mlp-2", "mlp-3")
MOMENTA: dict[str, dict[str, Any]] = {
    "none": {"momentum": False},
    "order 1": {},
    "order 2": {"momentum_order": 2},
    "order 3, mixed": {"momentum_order": 3, "learned_momentum_combine": True},
    "order 2, all mixed": {
        "momentum_order": 2,
        "learned_momentum_combine": True,
        "learned_combine_include_zeroth": True,
    },
}

# ---- models ----


def make_network(name: str, width: int) -> nn.Module:
    import titans_pytorch

    constructor, arguments = NETWORKS[name]
    network: nn.Module = getattr(titans_pytorch, constructor)(width, **arguments)
    return network


def _memory_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    name = kwargs.get("activation")
    return kwargs | {"activation": ACTIVATIONS[name]() if name else None}


def make_memory(seed: int, network: str, **kwargs: Any) -> nn.Module:
    """A NeuralMemory in float32; kwargs: the constructor's, `activation` by name."""
    import titans_pytorch

    torch.manual_seed(seed)
    width = kwargs.get("dim_head") or kwargs["dim"]
    module: nn.Module = titans_pytorch.NeuralMemory(model=make_network(network, width), **_memory_kwargs(kwargs))
    return randomise(module).eval()


def make_transformer(seed: int, network: str, memory: dict[str, Any], **kwargs: Any) -> nn.Module:
    """A MemoryAsContextTransformer in float32; memory: its neural_memory_kwargs, `activation` by name."""
    import titans_pytorch

    torch.manual_seed(seed)
    module: nn.Module = titans_pytorch.MemoryAsContextTransformer(
        neural_memory_model=make_network(network, memory.get("dim_head") or kwargs["dim"]),
        neural_memory_kwargs=_memory_kwargs(memory),
        **kwargs,
    )
    return randomise(module).eval()


def _trained(name: str) -> bool:
    """Not the rotary frequencies, and not what the library keeps beside the parameters that it uses."""
    return not name.endswith("rotary_emb.freqs") and "memory_model." not in name


def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter that begins as a constant, and parts heads that begin alike. Nothing stays zero."""
    for name, parameter in module.named_parameters():
        if not _trained(name) or not parameter.numel():
            continue
        value = parameter.detach().clone()  # the library's may be views of one head's
        if name.endswith("transition_gate"):
            value = torch.tensor(0.4)  # begins at -5, where hardly anything is learned
        elif (value == value.flatten()[0]).all():
            value = value + 0.2 * torch.randn_like(value)
        elif any(part in name for part in ("memory_model_parameters", "static_alpha", "static_beta")):
            value = value + 0.1 * torch.randn_like(value)
        elif "persistent_memory" in name or "longterm_mems" in name:
            value = value + 0.5 * torch.randn_like(value)
        parameter.data = value
    zeros = [name for name, p in module.named_parameters() if _trained(name) and p.numel() and not p.any()]
    assert not zeros, zeros
    return module


# ---- what the library computes ----


def parallel_forward(module: nn.Module, inputs: Tensor) -> Tensor:
    """What training saw, of one stream in the dtype of the module. inputs: (T,) tokens, or (T, dim) or (T, 3, dim)
    vectors. Returns (T, size).
    """
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        if inputs.dim() == 1:
            logits: Tensor = module(inputs[None].long(), disable_flex_attn=True)
            return logits[0]
        given = inputs.to(dtype)
        given = given[None] if given.dim() == 2 else given.transpose(0, 1).unsqueeze(1)
        retrieved: Tensor = module(given)[0]
        return retrieved[0]


def cached_decoding(module: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Logits (T, size) of `sample(use_cache=True)` if it drew `tokens`, (T,), after the first `prompt` of them."""
    rows = module.seq_len_with_longterm_mem(len(tokens))
    axes = module.axial_pos_emb.maybe_derive_outer_dim(rows, (module.neural_memory_segment_len,))
    with torch.no_grad():
        positions = module.axial_pos_emb(axes, return_factorized=True)
        out, cache, length = [], None, prompt
        while length <= len(tokens):
            logits, cache = module(
                tokens[None, :length],
                disable_flex_attn=True,
                cache=cache,
                return_cache=True,
                factorized_pos_emb=positions,
            )
            if logits is None:  # a longterm row
                continue
            out.append(logits[0])
            length += 1
    return torch.cat(out)


def double(module: nn.Module) -> nn.Module:
    """A copy in float64, with the epsilons of float32."""
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if isinstance(part, nn.RMSNorm) and part.eps is None:
            part.eps = torch.finfo(torch.float32).eps
    return exact


# ---- option sets of a bare memory that cover every pair of values ----

Options = dict[str, Any]
FACTORS: dict[str, list[Any]] = {
    "network": list(NETWORKS),
    "momentum": list(MOMENTA),
    "activation": [None, "silu", "gelu", "relu", "tanh"],
    "chunk_size": [4, 1, 5, 8],
    "heads": [2, 1, 4],
    "batch": ["never", "chunk", "eight chunks"],
    "modulation": [None, 1.0, 2.5],
    "max_grad_norm": [None, 0.02],
    "spectral_norm_surprises": [False, True],
    "attn_pool_chunks": [False, True],
    "num_kv_per_token": [1, 2],
    "qk_rmsnorm": [False, True],
    "pre_rmsnorm": [True, False],
    "post_rmsnorm": [False, True],
    "mem_model_norm_add_residual": [True, False],
    "per_head_learned_parameters": [True, False],
    "gated_transition": [False, True],
    "store_with_lookahead_value": [False, True],
    "qkv_receives_diff_views": [False, True],
}
# What the library fails on or gets wrong, and what makes NaN.
IMPOSSIBLE: list[Options] = [
    {"chunk_size": 1, "attn_pool_chunks": True},
    {"chunk_size": 1, "store_with_lookahead_value": True},
    # A gradient may be zero, and has no norm that could be clamped.
    {"chunk_size": 1, "activation": "relu", "max_grad_norm": 0.02},
    # Where a stream ends with a batch, the library's last output is of the weights before the transition.
    {"chunk_size": 1, "batch": "chunk", "gated_transition": True},
]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def possible(options: Options) -> bool:
    """Whether the library takes them; they may be incomplete."""
    return not any(all(options.get(key, "") == value for key, value in bad.items()) for bad in IMPOSSIBLE)


def pairs_of(options: Options) -> set[Pair]:
    """Every two values of it, in the order of FACTORS."""
    return set(itertools.combinations([(name, options[name]) for name in FACTORS if name in options], 2))


def possible_pairs() -> set[Pair]:
    """Every two values that the library takes together."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if possible({a: x, b: y})
    }


# Ways to make a memory of an option set that float32 computes well: what values are multiplied with, forget gates at
# the beginning (None: the whole stream is to forget about half), largest step size, what first weights are multiplied
# with. The first in which the library's own float32 is near its float64 is taken.
Temper = tuple[float, float | None, float, float]
TEMPERS: list[Temper] = [(1, None, 0.05, 1), (10, 0.8, 0.01, 1), (10, None, 0.01, 3), (1, None, 0.005, 1)]


FLAGS: dict[str, tuple[str, Any]] = {
    "orth": ("spectral_norm_surprises", True),
    "pool": ("attn_pool_chunks", True),
    "2kv": ("num_kv_per_token", 2),
    "qk": ("qk_rmsnorm", True),
    "raw": ("pre_rmsnorm", False),
    "post": ("post_rmsnorm", True),
    "no-res": ("mem_model_norm_add_residual", False),
    "same": ("per_head_learned_parameters", False),
    "gated": ("gated_transition", True),
    "look": ("store_with_lookahead_value", True),
    "views": ("qkv_receives_diff_views", True),
}
# The first eight factors, flags for the rest, a seed, and which of TEMPERS. Grown from pairs that were missing, by what
# covered most others.
# fmt: off
_SETS: list[tuple[Any, ...]] = [
    ("gated-residual", "none", None, 4, 4, "eight chunks", 2.5, None, "2kv no-res", 0, 0),
    ("mlp-3", "order 1", "silu", 5, 1, "never", 1.0, 0.02, "orth pool raw post same gated look views", 1, 0),
    ("mlp-2", "order 2", "gelu", 5, 2, "never", 1.0, 0.02, "orth qk raw post same gated look views", 1, 0),
    ("mlp-4", "order 2, all mixed", "relu", 8, 2, "chunk", None, 0.02, "pool 2kv qk post look", 3, 1),
    ("swiglu", "order 3, mixed", "tanh", 4, 1, "chunk", None, None, "pool qk raw no-res same gated views", 4, 0),
    ("mlp-1", "order 3, mixed", "tanh", 1, 4, "never", None, None, "orth qk raw no-res same gated views", 4, 1),
    ("factorized", "order 3, mixed", "gelu", 5, 4, "eight chunks", 1.0, 0.02, "pool 2kv no-res look views", 6, 0),
    ("mlp-1", "order 2", "tanh", 8, 1, "eight chunks", 2.5, 0.02, "orth pool 2kv post gated", 7, 0),
    ("mlp-3", "order 1", "silu", 1, 2, "chunk", 2.5, None, "2kv qk raw no-res", 8, 0),
    ("swiglu", "order 1", "silu", 1, 2, "eight chunks", None, None, "2kv post no-res same", 8, 1),
    ("factorized", "none", None, 8, 1, "never", 1.0, None, "orth qk raw post same gated look", 10, 0),
    ("mlp-2", "order 2, all mixed", "relu", 4, 1, "never", 2.5, None, "orth no-res look views", 10, 1),
    ("mlp-4", "order 2", "relu", 5, 4, "eight chunks", 2.5, None, "qk raw no-res same gated", 12, 1),
    ("gated-residual", "order 2, all mixed", "gelu", 8, 4, "chunk", 1.0, None, "raw same gated views", 13, 0),
    ("mlp-1", "none", "tanh", 5, 2, "chunk", None, 0.02, "pool 2kv qk post same look views", 15, 0),
    ("swiglu", "order 3, mixed", "silu", 8, 4, "never", 1.0, 0.02, "orth 2kv raw post gated look", 16, 1),
    ("mlp-2", "order 1", None, 8, 4, "chunk", None, 0.02, "pool 2kv no-res gated", 17, 0),
    ("mlp-4", "order 2", None, 1, 1, "never", 1.0, 0.02, "orth 2kv post views", 18, 2),
    ("gated-residual", "order 2", "silu", 4, 2, "chunk", None, 0.02, "pool qk raw post same gated look views", 19, 0),
    ("factorized", "order 2, all mixed", "silu", 1, 2, "eight chunks", 2.5, 0.02, "2kv post views", 20, 1),
    ("mlp-1", "order 1", "relu", 4, 1, "chunk", 1.0, None, "orth 2kv qk post no-res gated look", 21, 1),
    ("mlp-3", "order 3, mixed", None, 4, 2, "never", 2.5, 0.02, "pool 2kv qk no-res same views", 22, 0),
    ("mlp-3", "none", "gelu", 8, 4, "eight chunks", None, None, "pool post gated", 23, 0),
    ("swiglu", "order 2, all mixed", None, 5, 1, "never", 2.5, None, "pool 2kv qk raw same gated look", 24, 1),
    ("mlp-4", "order 1", "gelu", 4, 1, "never", 2.5, 0.02, "orth pool qk raw same gated views", 25, 0),
    ("swiglu", "order 1", "gelu", 1, 1, "never", 2.5, None, "qk raw post no-res views", 25, 1),
    ("factorized", "order 1", "tanh", 4, 2, "chunk", None, None, "pool same gated", 27, 0),
    ("mlp-4", "none", "silu", 1, 4, "never", None, 0.02, "2kv qk raw same gated", 28, 0),
    ("mlp-2", "none", "relu", 5, 4, "eight chunks", 2.5, 0.02, "pool qk no-res gated views", 29, 1),
    ("gated-residual", "order 3, mixed", "relu", 1, 1, "never", None, None, "orth no-res gated views", 30, 1),
    ("gated-residual", "order 2, all mixed", "tanh", 5, 1, "never", 1.0, None, "pool 2kv qk no-res gated look", 31, 0),
    ("mlp-3", "order 2, all mixed", "tanh", 4, 1, "never", 1.0, None, "pool 2kv raw same gated", 31, 0),
    ("mlp-2", "order 3, mixed", "tanh", 1, 2, "never", 1.0, None, "2kv no-res same gated", 33, 0),
    ("mlp-4", "order 3, mixed", "tanh", 8, 4, "never", None, None, "2kv qk post no-res look views", 34, 2),
    ("mlp-1", "order 2, all mixed", None, 4, 2, "never", None, None, "same gated look", 34, 0),
    ("mlp-3", "order 2", "relu", 5, 2, "never", 1.0, None, "pool 2kv qk no-res same look views", 36, 1),
    ("swiglu", "none", "relu", 8, 2, "never", 2.5, None, "pool post same views", 37, 0),
    ("swiglu", "order 2", "relu", 8, 2, "never", 2.5, None, "pool raw post no-res look", 37, 0),
    ("factorized", "order 2", "relu", 1, 1, "never", None, None, "gated", 39, 1),
    ("mlp-1", "order 3, mixed", "gelu", 1, 1, "never", 2.5, None, "qk raw no-res", 40, 1),
    ("gated-residual", "order 1", None, 5, 1, "never", 2.5, None, "pool qk raw gated", 41, 1),
    ("mlp-1", "none", "silu", 4, 2, "never", 1.0, None, "2kv qk post same look", 42, 0),
    ("mlp-2", "order 2", "silu", 5, 4, "never", 1.0, None, "views", 43, 0),
]
# fmt: on


class MemorySet(NamedTuple):
    options: Options
    seed: int
    temper: Temper


def _memory_set(network: str, momentum: str, *rest: Any) -> MemorySet:
    *values, flags, seed, temper = rest
    options = dict(zip(FACTORS, (network, momentum, *values), strict=False))
    others = {name: choices[0] for name, choices in FACTORS.items() if name not in options}
    return MemorySet(options | others | dict(FLAGS[flag] for flag in flags.split()), seed, TEMPERS[temper])


MEMORY_SETS = [_memory_set(*row) for row in _SETS]


def memory_of(options: Options, seed: int, temper: Temper) -> nn.Module:
    """The library's module of an option set."""
    values, forget, step_size, first = temper
    kwargs = {key: value for key, value in options.items() if key not in ("network", "momentum", "batch", "modulation")}
    chunk, heads = options["chunk_size"], options["heads"]
    kwargs |= MOMENTA[options["momentum"]]
    kwargs |= {
        "dim": 12 if heads == 1 else 16,
        "dim_head": {1: 12, 2: 10, 4: 8}[heads],
        "batch_size": {"never": None, "chunk": chunk, "eight chunks": 8 * chunk}[options["batch"]],
        "per_parameter_lr_modulation": options["modulation"] is not None,
        "max_mem_layer_modulation": options["modulation"] or 1.0,
        "default_step_transform_max_lr": step_size,
    }
    module = make_memory(seed, options["network"], **kwargs)
    scale(module, values, first)
    set_forgetting(module, chunk / 800 if forget is None else forget)
    return module


def scale(module: nn.Module, values: float, first: float, read: float = 1) -> None:
    """Multiplies the projections to values, the memories' first weights, and the projections of what they give."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("to_values.weight", "to_values.0.weight")):
                parameter.mul_(values)
            elif "memory_model_parameters" in name and parameter.dim() >= 2 and parameter.shape[-2] > 1:
                parameter.mul_(first)
            elif name.endswith("combine_heads.weight"):
                parameter.mul_(read)


def set_forgetting(module: nn.Module, share: float) -> None:
    """What the forget gates are at where their inputs are zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("to_decay_factor.0.bias"):
                parameter.add_(math.log(share / (1 - share)))


# ---- a bare memory ----


def memory(**options: object) -> torch.nn.Module:
    """A small one, what starts at zero randomised."""
    import titans_pytorch

    torch.manual_seed(0)
    module = titans_pytorch.NeuralMemory(
        16, chunk_size=4, dim_head=8, heads=2, model=titans_pytorch.MemoryMLP(8, depth=2), **options
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    return module
