"""What decides the mathematics of a titans-pytorch-mlx model. Nothing here has a default: the importer knows those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["lmm", "mag", "mal"]
VARIANTS: tuple[Variant, ...] = ("lmm", "mag", "mal")


@dataclass(frozen=True)
class ModelOptions:
    """A whole model.

    segment: tokens of one call of the library's forward: they share a context and one update of the memory. hidden:
    inner width of the feed-forward network. memory_widths: of the memory network, from input to output. conv: width of
    the causal convolutions on q, k and v, 0 for none. step_limit, momentum_limit: what the gates are multiplied with.
    heads, window, persistent, rotary: of the attention; lmm has none and ignores them.
    """

    variant: Variant
    vocab_size: int
    dim: int
    layers: int
    hidden: int
    segment: int
    memory_widths: tuple[int, ...]
    activation: Literal["silu", "gelu", "relu"]
    conv: int
    step_limit: float
    momentum_limit: float
    heads: int
    window: int
    persistent: int
    rotary: bool
