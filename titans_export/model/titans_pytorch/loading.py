"""Loads the library's tensors, under the library's names, into stream models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...named_tensors import under
from ..fast_networks import NetworkSpec
from ..layers import Linear
from ..rounding import set_rounded
from .attention import StreamAttention
from .memory import HeadNorm, NeuralMemoryLayer
from .positions import AxialPositions
from .transformer import Connection, FeedForward, Layer, MemoryAsContext, ViewSelector

Tensors = Mapping[str, Tensor]


def library_order(network: NetworkSpec) -> list[str]:
    """Our names of the memory network's tensors, in the order of the library's named_parameters()."""
    names = list(network.shapes)
    norm = ["gamma"] if network.norm else []
    inner = [name for name in names if name != "gamma"]
    if network.kind == "gated-residual":  # the module's own final projection precedes those of the blocks
        inner = [inner[-1], *inner[:-1]]
    return norm + inner


def set_linear(linear: Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Sets the parameters of a Linear. weight: (out, in), as in nn.Linear."""
    linear.weight.data.copy_(weight.t())
    if linear.bias is not None and bias is not None:
        linear.bias.data.copy_(bias)


def _first(tensors: Tensors, *names: str) -> Tensor:
    return next(tensors[name] for name in names if name in tensors)


def _set_norm(norm: HeadNorm | None, gamma: Tensor | None) -> None:
    if norm is not None and gamma is not None:
        set_rounded(norm.weight, gamma.double() + 1)


def _gate_rows(layer: NeuralMemoryLayer, tensors: Tensors, kind: str) -> Tensor:
    """Rows of the merged chunk gates: (heads, per head), for weight (..., dim) or bias (...)."""
    heads = layer.options.heads
    names = {
        "forget": "to_decay_factor",
        "momentum": "to_momentum",
        "modulation": "to_layer_modulation",
        "previous_gate": "to_learned_weight_residual_mix",
        "combine": "to_learned_momentum_combine",
    }
    parts = []
    for gate, size in layer.gate_sizes.items():
        if not size:
            continue
        rows = tensors[f"{names[gate]}.0.{kind}"]
        rows = rows.reshape(heads, size, *rows.shape[1:])
        if gate == "modulation":
            ours, theirs = list(layer.spec.network.shapes), library_order(layer.spec.network)
            rows = rows[:, [theirs.index(name) for name in ours]]
        parts.append(rows)
    merged = torch.cat(parts, 1)
    return merged.reshape(-1, *merged.shape[2:])


@torch.no_grad()
def load_memory(layer: NeuralMemoryLayer, tensors: Tensors) -> None:
    """tensors: those of one NeuralMemory, without its prefix."""
    options = layer.options
    if layer.retrieve_norm is not None and layer.store_norm is not None:
        layer.retrieve_norm.copy_(tensors["retrieve_norm.weight"])
        layer.store_norm.copy_(tensors["store_norm.weight"])
    _set_norm(layer.q_norm, tensors.get("q_norm.gamma"))
    _set_norm(layer.k_norm, tensors.get("k_norm.gamma"))
    _set_norm(layer.post_norm, tensors.get("multihead_rmsnorm.gamma"))
    queries = [_first(tensors, "to_queries.weight", "to_queries.0.weight")]
    if options.heads > 1:
        queries.append(tensors["retrieve_gate.0.weight"])
    set_linear(layer.query, torch.cat(queries))
    keys = _first(tensors, "to_keys.weight", "to_keys.0.weight")
    rows, biases = [keys, tensors["to_adaptive_step.0.weight"]], [keys.new_zeros(keys.shape[0])]
    biases.append(tensors["to_adaptive_step.0.bias"])
    if options.attn_pool_chunks:
        rows.append(tensors["reduce_to_chunk_rep.to_attn_logits.weight"])
        biases.append(tensors["reduce_to_chunk_rep.to_attn_logits.bias"])
    set_linear(layer.key, torch.cat(rows), torch.cat(biases))
    set_linear(layer.value, _first(tensors, "to_values.weight", "to_values.0.weight"))
    set_linear(layer.gates, _gate_rows(layer, tensors, "weight"), _gate_rows(layer, tensors, "bias"))
    if layer.out is not None:
        set_linear(layer.out, tensors["combine_heads.weight"])
    if layer.transition is not None:
        layer.transition.copy_(tensors["transition_gate"])
    order = library_order(layer.spec.network)
    for name, parameter in zip(layer.spec.network.shapes, layer.initial, strict=True):
        parameter.copy_(tensors[f"memory_model_parameters.{order.index(name)}"])


def _load_positions(positions: AxialPositions, tensors: Tensors) -> None:
    """tensors: of axial_pos_emb.mlps."""
    for name, linear in (("0.0", positions.first), ("0.2", positions.middle), ("0.4", positions.last)):
        set_linear(linear, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
    x = torch.arange(positions.size, dtype=torch.float64).unsqueeze(-1)
    for i, name in enumerate(("1.0", "1.2", "1.4")):
        x = F.silu(x) if i else x
        x = F.linear(x, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double())
    set_rounded(positions.table, x)


def _load_connection(connection: Connection, tensors: Tensors) -> None:
    """Folds the norm's scale and the learned scales into the projection."""
    if connection.plain:
        return
    alpha = tensors["dynamic_alpha_fn"][0].double()
    scales = torch.cat([tensors["pre_branch_scale"], tensors["residual_scale"].expand(alpha.shape[1] - 1)])
    columns, biases = [alpha * scales.double()], [tensors["static_alpha"]]
    if "dynamic_beta_fn" in tensors:
        columns.append((tensors["dynamic_beta_fn"].double() * tensors["h_post_scale"].double()).reshape(-1, 1))
        biases.append(tensors["static_beta"].reshape(-1, 1))
    gain = (tensors["norm.gamma"].double() + 1) * alpha.shape[0] ** 0.5
    set_rounded(connection.projection, torch.cat(columns, 1) * gain.unsqueeze(-1))
    connection.bias.copy_(torch.cat(biases, 1))


def _load_attention(attention: StreamAttention, tensors: Tensors) -> None:
    attention.norm.copy_(tensors["norm.weight"])
    attention.persistent.copy_(tensors["persistent_memory"])
    attention.rotary.set_frequencies(tensors["rotary_emb.freqs"])
    rows = [tensors["to_qkv.weight"]]
    if attention.mix_bias is not None:
        rows.append(tensors["to_learned_v_mix.0.weight"])
        attention.mix_bias.copy_(tensors["to_learned_v_mix.0.bias"])
    set_linear(attention.qkv, torch.cat(rows))
    set_linear(attention.out, tensors["to_out.weight"])


def _load_ff(ff: FeedForward, tensors: Tensors) -> None:
    ff.norm.copy_(tensors["0.weight"])
    set_linear(ff.up, tensors["1.weight"], tensors["1.bias"])
    set_linear(ff.down, tensors["3.weight"], tensors["3.bias"])


def _load_selector(selector: ViewSelector, tensors: Tensors) -> None:
    selector.norm.copy_(tensors["0.weight"])
    set_linear(selector.select, tensors["1.weight"], tensors["1.bias"])


def _load_layer(layer: Layer, tensors: Tensors) -> None:
    if layer.memory is not None and layer.memory_connection is not None:
        _load_connection(layer.memory_connection, under(tensors, "0."))
        load_memory(layer.memory, under(tensors, "4."))
    if layer.selector is not None:
        _load_selector(layer.selector, under(tensors, "3."))
    _load_connection(layer.attention_connection, under(tensors, "1."))
    _load_connection(layer.ff_connection, under(tensors, "2."))
    _load_attention(layer.attention, under(tensors, "5."))
    _load_ff(layer.ff, under(tensors, "6."))


@torch.no_grad()
def load_transformer(model: MemoryAsContext, tensors: Tensors) -> None:
    """tensors: the state dict of a MemoryAsContextTransformer."""
    model.embedding.copy_(tensors["token_emb.weight"])
    model.longterm.copy_(tensors["longterm_mems"])
    model.norm.copy_(tensors["norm.weight"])
    set_linear(model.head, tensors["to_logits.weight"])
    if model.stream_embedding is not None:
        model.stream_embedding.copy_(tensors["expand_streams.stream_embed"])
    _load_positions(model.positions, under(tensors, "axial_pos_emb.mlps."))
    for i, layer in enumerate(model.layers):
        _load_layer(layer, under(tensors, f"layers.{i}."))  # type: ignore[arg-type]  # ModuleList forgets the class
