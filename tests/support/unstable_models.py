"""Small models of titans-pytorch: stable ones, and chaotic ones that amplify rounding."""

from __future__ import annotations

from typing import Any

import torch
from library_models import make_network
from torch import nn

COMMON: dict[str, Any] = {
    "num_tokens": 32,
    "dim": 16,
    "depth": 2,
    "segment_len": 8,
    "num_longterm_mem_tokens": 2,
    "num_persist_mem_tokens": 2,
    "dim_head": 8,
    "heads": 2,
    "num_residual_streams": 4,
    "neural_memory_segment_len": 4,
    "neural_memory_batch_size": 8,
}
MEMORY: dict[str, Any] = {"dim_head": 8, "heads": 2, "qk_rmsnorm": True}
# Orthogonalised surprises and large steps make a model chaotic.
CHAOTIC: dict[str, Any] = {"spectral_norm_surprises": True, "default_step_transform_max_lr": 0.5}
STABLE: dict[str, Any] = {"default_step_transform_max_lr": 0.01}
# The model of a public report, lucidrains/titans-pytorch 61.
REPORTED: dict[str, Any] = {
    "num_tokens": 256,
    "dim": 64,
    "depth": 2,
    "segment_len": 32,
    "num_longterm_mem_tokens": 4,
    "num_persist_mem_tokens": 4,
    "neural_memory_segment_len": 16,
    "neural_memory_batch_size": 64,
    "neural_mem_weight_residual": True,
    "neural_memory_qkv_receives_diff_views": True,
    "neural_memory_kwargs": {"dim_head": 64, "heads": 1},
}


def make(chaotic: bool, seed: int, **options: Any) -> nn.Module:
    """A transformer with random weights. options: of the transformer; `memory`: of its memory."""
    import titans_pytorch

    memory = {**MEMORY, **(CHAOTIC if chaotic else STABLE), **options.pop("memory", {})}
    torch.manual_seed(seed)
    module: nn.Module = titans_pytorch.MemoryAsContextTransformer(
        neural_memory_model=make_network("mlp-2", memory["dim_head"]),
        neural_memory_kwargs=memory,
        **{**COMMON, **options},
    )
    return module.eval()


def reported(seed: int) -> nn.Module:
    """The model of the public report with random weights."""
    import titans_pytorch

    torch.manual_seed(seed)
    module: nn.Module = titans_pytorch.MemoryAsContextTransformer(**REPORTED)
    return module.eval()
