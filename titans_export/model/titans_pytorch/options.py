"""The options that determine the mathematics of a titans-pytorch model, named as the constructor arguments of version
0.5.

Arguments that only choose initial values or an implementation (init_*_bias, use_accelerated_scan, use_flex_attn) are
left out. No option has a default here; the importer (checkpoints/titans_pytorch) supplies the library's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class NetworkOptions:
    """The memory network. kind: MemoryMLP, GatedResidualMemoryMLP, FactorizedMemoryMLP or MemorySwiGluMLP.

    hidden: inner width of the MLPs (int(dim_head * expansion_factor), SwiGLU: int(dim_head * expansion_factor * 2 /
    3)), or the rank k of the factorised network.
    """

    kind: Literal["mlp", "gated-residual", "factorized", "swiglu"]
    depth: int
    hidden: int


@dataclass(frozen=True)
class MemoryOptions:
    """NeuralMemory's arguments. dim_head is never None, chunk_size is one number, and batch_size None means never."""

    dim: int
    chunk_size: int
    batch_size: int | None
    dim_head: int
    heads: int
    network: NetworkOptions
    default_step_transform_max_lr: float
    per_parameter_lr_modulation: bool
    max_mem_layer_modulation: float
    per_head_learned_parameters: bool
    attn_pool_chunks: bool
    momentum: bool
    momentum_order: int
    learned_momentum_combine: bool
    learned_combine_include_zeroth: bool
    num_kv_per_token: int
    qkv_receives_diff_views: bool
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    max_grad_norm: float | None
    activation: Literal["silu", "gelu", "relu", "tanh", "sigmoid"] | None
    accept_weight_residual: bool
    spectral_norm_surprises: bool
    gated_transition: bool
    mem_model_norm_add_residual: bool
    store_with_lookahead_value: bool


@dataclass(frozen=True)
class TransformerOptions:
    """MemoryAsContextTransformer's arguments.

    memory: the arguments that the transformer gives each memory layer. accept_weight_residual applies to all memory
    layers but the first. chunk_size is neural_memory_segment_len, batch_size is neural_memory_batch_size.
    neural_memory_layers: layer numbers, counted from 1.
    """

    num_tokens: int
    dim: int
    depth: int
    segment_len: int
    num_longterm_mem_tokens: int
    num_persist_mem_tokens: int
    dim_head: int
    heads: int
    ff_hidden: int  # int(dim * ff_mult * 2 / 3)
    num_residual_streams: int
    neural_memory_layers: tuple[int, ...]
    sliding_window_attn: bool
    neural_mem_gate_attn_output: bool
    neural_mem_weight_residual: bool
    neural_memory_qkv_receives_diff_views: bool
    memory: MemoryOptions

    def memory_of(self, first: bool) -> MemoryOptions:
        """The arguments of one memory layer. Only layers after the first receive the previous layer's weights."""
        return replace(self.memory, accept_weight_residual=self.neural_mem_weight_residual and not first)
