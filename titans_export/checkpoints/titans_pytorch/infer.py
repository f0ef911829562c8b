"""Constructor arguments inferred from names and shapes of tensors, each with the tensor as evidence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...model.titans_pytorch.options import NetworkOptions
from .config import ATTENTION_REFUSED, CLASSES, Kind, NetworkKind
from .layout import (
    ATTENTION,
    FEED_FORWARD,
    MEMORY,
    MEMORY_CONNECTION,
    SELECTOR,
    Shape,
    Shapes,
    layer_prefix,
    network_shapes,
)


class Found(NamedTuple):
    """An inferred value. evidence: a clause with the tensor and shape that determine it."""

    value: Any
    evidence: str


@dataclass(frozen=True)
class FoundNetwork:
    """The memory network; kind is None if several networks have these shapes."""

    kind: NetworkKind | None
    depth: int
    hidden: int
    evidence: str


class View:
    """The shapes of the tensors with a prefix, by the rest of their names."""

    def __init__(self, shapes: Shapes, prefix: str = "") -> None:
        self.prefix = prefix
        self.shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def under(self, prefix: str) -> View:
        inner = View(self.shapes, prefix)
        inner.prefix = self.prefix + prefix
        return inner

    def evidence(self, name: str) -> str:
        if name in self.shapes:
            return f"tensor {self.prefix}{name} has shape {list(self.shapes[name])}"
        return f"there is no tensor {self.prefix}{name}"

    def has(self, name: str) -> Found:
        return Found(name in self.shapes, self.evidence(name))

    def shape(self, name: str, dimensions: int) -> Shape:
        if name not in self.shapes:
            raise CheckpointError(
                "E0304",
                "checkpoint",
                f"no tensor {self.prefix}{name}, which every titans-pytorch 0.5 model of this kind has",
                "give the state dict of the whole module",
            )
        shape = self.shapes[name]
        if len(shape) != dimensions or (name != "longterm_mems" and "persistent" not in name and 0 in shape):
            raise CheckpointError(
                "E0304",
                "checkpoint",
                f"wrong shape of tensor {self.prefix}{name}: expected {dimensions} positive sizes, got {list(shape)}",
                "give an unchanged state dict of titans-pytorch 0.5",
            )
        return shape

    def size(self, name: str, axis: int, dimensions: int = 2, per: int = 1) -> Found:
        size = self.shape(name, dimensions)[axis]
        if size % per:
            raise CheckpointError(
                "E0304",
                "checkpoint",
                f"wrong shape of tensor {self.prefix}{name}: expected a multiple of {per} along axis {axis}, "
                f"got {list(self.shapes[name])}",
                "give an unchanged state dict of titans-pytorch 0.5",
            )
        return Found(size // per, self.evidence(name))


# A tensor of each class that no other class has.
_SIGNS: dict[Kind, str] = {
    "transformer": "axial_pos_emb.mlps.0.0.weight",
    "memory": "to_adaptive_step.0.weight",
}
_BELONGS = re.compile(
    r"layers\.\d+\.[0-6]\.|axial_pos_emb|expand_streams|longterm_mems$|(token_emb|norm|to_logits)\.weight$"
)


def find_kind(shapes: Shapes) -> Kind:
    """The class of the state dict. Raises CheckpointError for other versions and other models."""
    _refuse_other_versions(shapes)
    for kind, sign in _SIGNS.items():
        if sign in shapes:
            return kind
    foreign = [name for name in sorted(shapes) if not _BELONGS.match(name)] or sorted(shapes)
    classes, fix = " or ".join(CLASSES.values()), "give the state dict of one of these"
    for kind, sign in _SIGNS.items():
        if inside := next((name for name in sorted(shapes) if name.endswith(f".{sign}")), None):
            module = inside.removesuffix(f".{sign}")
            fix = f"save the state dict of the {CLASSES[kind]} in it, module {module}, alone"
            break
    problem = f"tensors of another model than {classes}: {', '.join(foreign[:3])}"
    raise CheckpointError("E0312", "checkpoint", problem, fix)


def _refuse_other_versions(shapes: Shapes) -> None:
    """Recognises other versions by tensors that only they have."""
    signs: list[tuple[str, Callable[[str], bool]]] = [
        ("titans-pytorch 0.3 or older", lambda name: name.endswith(("to_keys_values.weight", "empty_memory_embed"))),
        ("titans-pytorch 0.4 or older", lambda name: name.endswith(("dynamic_alpha_scale", "dynamic_beta_scale"))),
        (
            "hyper-connections older than 0.4",
            lambda name: name.endswith(".dynamic_alpha_fn") and len(shapes[name]) == 2,
        ),
    ]
    for version, recognises in signs:
        if sign := next((name for name in sorted(shapes) if recognises(name)), None):
            raise CheckpointError(
                "E0313",
                "checkpoint",
                "unsupported version of titans-pytorch: expected 0.5 with hyper-connections 0.4, "
                f"got {sign} of shape {list(shapes[sign])}, as in {version}",
                "train with version 0.5, as others compute something else",
            )


def infer_memory(view: View) -> tuple[dict[str, Found], FoundNetwork]:
    """A NeuralMemory's arguments, and "activated", whether there is an activation; then its network."""
    heads = view.size("to_decay_factor.0.weight", 0)
    per = heads.value
    query = "to_queries.0.weight" if view.has("to_queries.0.weight").value else "to_queries.weight"
    dim_head = view.size(query, 0, per=per)
    found = {
        "dim": view.size("to_decay_factor.0.weight", 1),
        "heads": heads,
        "dim_head": dim_head,
        "num_kv_per_token": view.size("to_adaptive_step.0.weight", 0, per=per),
        "per_parameter_lr_modulation": view.has("to_layer_modulation.0.weight"),
        "attn_pool_chunks": view.has("reduce_to_chunk_rep.to_attn_logits.weight"),
        "momentum": view.has("to_momentum.0.weight"),
        "learned_momentum_combine": view.has("to_learned_momentum_combine.0.weight"),
        "pre_rmsnorm": view.has("retrieve_norm.weight"),
        "post_rmsnorm": view.has("multihead_rmsnorm.gamma"),
        "qk_rmsnorm": view.has("q_norm.gamma"),
        "accept_weight_residual": view.has("to_learned_weight_residual_mix.0.weight"),
        "gated_transition": view.has("transition_gate"),
        "activated": view.has("to_queries.0.weight"),
    }
    if found["momentum"].value:
        order = found["momentum_order"] = view.size("to_momentum.0.weight", 0, per=per)
        if found["learned_momentum_combine"].value:
            combined = view.size("to_learned_momentum_combine.0.weight", 0, per=per)
            found["learned_combine_include_zeroth"] = Found(combined.value > order.value, combined.evidence)
    network, found["mem_model_norm_add_residual"] = _infer_network(view.under("memory_model."), dim_head.value)
    first = "memory_model_parameters.0"
    learned = view.shape(first, len(view.shapes.get(first, ())))
    shared = next(iter(_network_of(network, dim_head.value, found["mem_model_norm_add_residual"].value).values()))
    found["per_head_learned_parameters"] = Found(len(learned) > len(shared), view.evidence(first))
    return found, network


def infer_network(view: View, dim_head: int) -> list[str]:
    """Names of the memory network's tensors in memory_model, in the order of memory_model_parameters."""
    network, residual = _infer_network(view, dim_head)
    return list(_network_of(network, dim_head, residual.value))


def _network_of(network: FoundNetwork, dim_head: int, norm_add_residual: bool) -> Shapes:
    options = NetworkOptions(network.kind or "mlp", network.depth, network.hidden)
    return network_shapes(options, dim_head, norm_add_residual)


def _infer_network(view: View, dim: int) -> tuple[FoundNetwork, Found]:
    shapes = view.shapes
    residual = view.has("norm.gamma")
    if residual.value and not any(name.startswith("model.") for name in shapes):
        residual = Found(False, f"there is no tensor {view.prefix}model.*")  # the norm is MemorySwiGluMLP's own
    inner = view.under("model.") if residual.value else view
    first = next((name for name in ("weights.0", "weights.0.0") if name in inner.shapes), None)
    hidden = inner.shapes[first][-1] if first and len(inner.shapes[first]) == 2 else 0
    depth = len({name.split(".")[1] for name in inner.shapes if re.fullmatch(r"weights\.\d+(\.\d+)?", name)})
    candidates: list[tuple[NetworkKind, int]] = [
        ("mlp", hidden if depth > 1 else dim),
        ("gated-residual", hidden),
        ("factorized", hidden),
        ("swiglu", hidden // 2),
    ]
    kinds = [
        FoundNetwork(kind, depth, width, inner.evidence(first or "weights.0"))
        for kind, width in candidates
        if depth and network_shapes(NetworkOptions(kind, depth, width), dim, False) == inner.shapes
    ]
    if _is_attention(inner.shapes, dim):
        if not kinds:
            raise CheckpointError("E0312", "checkpoint", *ATTENTION_REFUSED)
        return FoundNetwork(None, depth, dim, kinds[0].evidence), residual
    if not kinds:
        known = re.compile(r"weights\.\d+(\.[012])?|norm\.gamma|final_proj")
        odd = next((name for name in sorted(inner.shapes) if not known.fullmatch(name)), first)
        got = f"tensor {inner.prefix}{odd} of shape {list(inner.shapes[odd])}" if odd else f"no tensor {view.prefix}*"
        raise CheckpointError(
            "E0312",
            "checkpoint",
            f"unsupported memory network: expected one of titans-pytorch, got {got}",
            "train with one of the library's, as a checkpoint does not contain the code of another module",
        )
    return kinds[0], residual


def _is_attention(shapes: Shapes, dim: int) -> bool:
    """MemoryAttention's shapes, which are also those of a MemoryMLP of depth 5 if everything is as wide as dim."""
    if set(shapes) != {f"weights.{i}" for i in range(5)}:
        return False
    *square, up, down = (shapes[f"weights.{i}"] for i in range(5))
    return square == [(dim, dim)] * 3 and up[:1] == (dim,) and down == up[::-1]


def infer_transformer(view: View) -> dict[str, Found]:
    """MemoryAsContextTransformer's arguments apart from its memory's."""
    tokens = "token_emb.weight"
    layers = {int(match[1]) + 1 for name in view.shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    depth = max(layers, default=0)
    if not layers or len(layers) != depth:
        gap = next(layer for layer in range(1, depth + 2) if layer not in layers)
        problem = f"no tensors {layer_prefix(gap, ATTENTION)}*"
        raise CheckpointError("E0304", "checkpoint", problem, "save the whole model")
    attention, feed_forward = (view.under(layer_prefix(1, part)) for part in (ATTENTION, FEED_FORWARD))
    memory = [layer for layer in sorted(layers) if view.under(layer_prefix(layer, MEMORY)).shapes]
    if not memory:
        problem = f"a transformer without a memory in layers 1 to {depth}"
        raise CheckpointError("E0312", "checkpoint", problem, "export it with another tool, as nothing in it learns")
    embedding = "expand_streams.stream_embed"
    streams = view.size(embedding, 0) if view.has(embedding).value else Found(1, view.evidence(embedding))
    parts = ", ".join(layer_prefix(layer, MEMORY) + "*" for layer in memory)
    found = {
        "num_tokens": view.size(tokens, 0),
        "dim": view.size(tokens, 1),
        "depth": Found(depth, f"the last layer's tensors are layers.{depth - 1}.*"),
        "num_longterm_mem_tokens": view.size("longterm_mems", 0),
        "num_persist_mem_tokens": attention.size("persistent_memory", 2, 4),
        "dim_head": attention.size("persistent_memory", 3, 4),
        "heads": attention.size("persistent_memory", 1, 4),
        "ff_hidden": feed_forward.size("3.weight", 1),
        "num_residual_streams": streams,
        "neural_memory_layers": Found(tuple(memory), f"those with a memory are {parts}"),
    }
    if streams.value > 1:
        beta = view.under(layer_prefix(memory[0], MEMORY_CONNECTION)).has("static_beta")
        found["neural_mem_gate_attn_output"] = Found(not beta.value, beta.evidence)
    if memory[-1] > 1:
        later = view.under(layer_prefix(memory[-1], SELECTOR))
        found["neural_memory_qkv_receives_diff_views"] = later.has("1.weight")
    if len(memory) > 1:
        later = view.under(layer_prefix(memory[-1], MEMORY))
        found["neural_mem_weight_residual"] = later.has("to_learned_weight_residual_mix.0.weight")
    return found
