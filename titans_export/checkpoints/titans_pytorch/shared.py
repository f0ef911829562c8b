"""Tensors that a trainer left out because they share memory with others.

Files of safetensors hold no shared memory. So accelerate and others save one name of each: memory_model_parameters may
lack, whose tensors are those of memory_model, and of all tensors without elements only the first remains.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...named_tensors import NamedTensors, TensorEntry
from .infer import View, infer_network
from .layout import ATTENTION, layer_prefix

_MEMORY_SIGN = "to_adaptive_step.0.weight"


def restore_shared(tensors: NamedTensors, per_head: bool) -> NamedTensors:
    """The tensors with those that were left out, as far as the others determine them.

    per_head: whether per_head_learned_parameters is given as true. The heads then have equal initial memories.
    """
    entries = dict(tensors.entries)
    for name in tensors:
        if name.endswith(_MEMORY_SIGN):
            entries |= _initial_memory(tensors, name.removesuffix(_MEMORY_SIGN), per_head)
    if any(0 in shape for shape in tensors.shapes.values()):
        entries |= _empty(tensors)
    return NamedTensors(entries)


def _initial_memory(tensors: NamedTensors, prefix: str, per_head: bool) -> dict[str, TensorEntry]:
    """memory_model_parameters of one memory, from memory_model."""
    view = View(tensors.shapes, prefix)
    own = view.under("memory_model.")
    if not own.shapes or view.under("memory_model_parameters.").shapes:
        return {}
    query = "to_queries.0.weight" if view.has("to_queries.0.weight").value else "to_queries.weight"
    heads = view.size("to_decay_factor.0.weight", 0).value
    names = infer_network(own, view.size(query, 0, per=heads).value)
    found = [tensors.entries[f"{prefix}memory_model.{name}"] for name in names]
    if per_head:
        found = [_repeated(entry, heads) for entry in found]
    return {f"{prefix}memory_model_parameters.{i}": entry for i, entry in enumerate(found)}


def _repeated(entry: TensorEntry, heads: int) -> TensorEntry:
    shape = (heads, *entry.shape)
    return replace(entry, shape=shape, read=lambda: entry.read().expand(shape))


def _empty(tensors: NamedTensors) -> dict[str, TensorEntry]:
    """Longterm and persistent memories of no rows."""
    shapes, made = tensors.shapes, {}
    if "token_emb.weight" in shapes and "longterm_mems" not in shapes:
        made["longterm_mems"] = _without_elements(0, shapes["token_emb.weight"][-1])
    layer = 1
    while (qkv := (prefix := layer_prefix(layer, ATTENTION)) + "to_qkv.weight") in shapes:
        frequencies = shapes.get(f"{prefix}rotary_emb.freqs", ())
        if f"{prefix}persistent_memory" not in shapes and len(frequencies) == 1 and frequencies[0]:
            width = 2 * frequencies[0]
            made[f"{prefix}persistent_memory"] = _without_elements(2, shapes[qkv][0] // (3 * width), 0, width)
        layer += 1
    return made


def _without_elements(*shape: int) -> TensorEntry:
    value = torch.empty(shape)
    return TensorEntry(shape, value.dtype, lambda: value)
