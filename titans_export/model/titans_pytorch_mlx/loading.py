"""The library's tensors: names, shapes, and loading into our parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...named_tensors import under
from ..layers import Linear
from .attention import SegmentWindowAttention
from .memory import SegmentMemory
from .model import Block, SegmentModel
from .options import ModelOptions

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def _memory_shapes(options: ModelOptions) -> Shapes:
    dim = options.dim
    shapes: Shapes = {f"proj_{x}.weight": (dim, dim) for x in ("k", "v", "q", "out")}
    if options.conv:
        for x in "kvq":
            shapes |= {f"conv_{x}.weight": (dim, 1, options.conv), f"conv_{x}.bias": (dim,)}
    for i, (size_in, size_out) in enumerate(zip(options.memory_widths[:-1], options.memory_widths[1:], strict=True)):
        shapes[f"memory.layers.{i}.weight"] = (size_out, size_in)
    for gate in ("decay", "lr", "momentum"):
        shapes |= {f"gate_{gate}.0.weight": (dim, dim), f"gate_{gate}.0.bias": (dim,)}
    return shapes


def _block_shapes(options: ModelOptions) -> Shapes:
    dim, hidden = options.dim, options.hidden
    shapes = {f"memory.{name}": shape for name, shape in _memory_shapes(options).items()}
    if options.variant != "lmm":
        shapes |= {f"attention.proj_{x}.weight": (dim, dim) for x in ("q", "k", "v", "out")}
        if options.rotary:
            shapes["attention.rope.inv_freq"] = (dim // options.heads // 2,)
        if options.persistent:
            shapes["persistent.tokens"] = (options.persistent, dim)
    shapes |= {f"ffn.{x}_proj.weight": (hidden, dim) for x in ("gate", "up")}
    shapes["ffn.down_proj.weight"] = (dim, hidden)
    norms = 3 if options.variant == "mal" else 2
    return shapes | {f"norm{i + 1}.weight": (dim,) for i in range(norms)}


def library_shapes(options: ModelOptions) -> Shapes:
    """Shapes of all tensors of the library's state dict. Its head.weight is its embed.weight."""
    shapes: Shapes = {"embed.weight": (options.vocab_size, options.dim), "norm.weight": (options.dim,)}
    block = _block_shapes(options)
    for i in range(options.layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def _set(linear: Linear, *weights: Tensor) -> None:
    """Sets a Linear from weights (out, in), as in nn.Linear, with their outputs side by side."""
    linear.weight.copy_(torch.cat(weights).t())


def _load_memory(memory: SegmentMemory, tensors: Tensors) -> None:
    _set(memory.qkv, *(tensors[f"proj_{x}.weight"] for x in "qkv"))
    _set(memory.out, tensors["proj_out.weight"])
    if memory.conv is not None and memory.conv_bias is not None:
        memory.conv.weight.copy_(torch.cat([tensors[f"conv_{x}.weight"] for x in "qkv"]).squeeze(1).t())
        memory.conv_bias.copy_(torch.cat([tensors[f"conv_{x}.bias"] for x in "qkv"]))
    gates = ("decay", "lr", "momentum")
    _set(memory.gates, *(tensors[f"gate_{gate}.0.weight"] for gate in gates))
    assert memory.gates.bias is not None
    memory.gates.bias.copy_(torch.cat([tensors[f"gate_{gate}.0.bias"] for gate in gates]))
    for i, weight in enumerate(memory.initial):
        weight.copy_(tensors[f"memory.layers.{i}.weight"].t())


def _load_attention(attention: SegmentWindowAttention, tensors: Tensors) -> None:
    projections = {"q": attention.query, "k": attention.key, "v": attention.value, "out": attention.out}
    for name, linear in projections.items():
        _set(linear, tensors[f"attention.proj_{name}.weight"])
    if attention.persistent is not None:
        attention.persistent.copy_(tensors["persistent.tokens"])
    if attention.table is not None:
        attention.table.set_frequencies(tensors["attention.rope.inv_freq"])


def _load_block(block: Block, tensors: Tensors) -> None:
    _load_memory(block.memory, under(tensors, "memory."))
    if block.attention is not None:
        _load_attention(block.attention, tensors)
    norms = [norm for norm in (block.norm_memory, block.norm_attention, block.norm_ff) if norm is not None]
    for i, norm in enumerate(norms, start=1):
        norm.weight.copy_(tensors[f"norm{i}.weight"])
    _set(block.ff.up, tensors["ffn.gate_proj.weight"], tensors["ffn.up_proj.weight"])
    _set(block.ff.down, tensors["ffn.down_proj.weight"])


@torch.no_grad()
def load_tensors(model: SegmentModel, tensors: Tensors) -> None:
    """tensors: those that `library_shapes` lists."""
    model.embedding.copy_(tensors["embed.weight"])
    _set(model.head, tensors["embed.weight"])
    model.norm.weight.copy_(tensors["norm.weight"])
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        _load_block(block, under(tensors, f"blocks.{i}."))
