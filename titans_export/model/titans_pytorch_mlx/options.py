"""The options that determine the mathematics of a titans-pytorch-mlx model. The importer supplies all defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["lmm", "mag", "mal"]
VARIANTS: tuple[Variant, ...] = ("lmm", "mag", "mal")


@dataclass(frozen=True)
class ModelOptions:
    """A whole model.

    segment: tokens per call of the library's forward. They share a context and one memory update.
    hidden: inner width of the feed-forward network.
    memory_widths: widths of the memory network, from input to output.
    conv: width of the causal convolutions on q, k and v, 0 for none.
    step_limit, momentum_limit: factors of the gates.
    heads, window, persistent, rotary: of the attention; lmm has no attention and ignores them.
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
