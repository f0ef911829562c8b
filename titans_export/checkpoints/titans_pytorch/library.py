"""The checkpoint in titans-pytorch itself, where it is installed: the judge of an export."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...model.float64 import Float64
from ...model.titans_pytorch.memory import NORM_EPS
from ...model.titans_pytorch.options import MemoryOptions, NetworkOptions, TransformerOptions
from .config import check_version
from .source import Source

Oracle = Callable[[Tensor], Tensor]
# What our options call another name than the library's constructors, or what they decide by other arguments.
_NOT_ARGUMENTS = {"network", "activation", "memory", "ff_hidden"}
_OF_TRANSFORMER = {"dim", "chunk_size", "batch_size", "qkv_receives_diff_views", "accept_weight_residual"}
_ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def installed() -> bool:
    """Whether a supported version of the library is installed."""
    try:
        check_version(importlib.metadata.version("titans-pytorch"), "the installed package")
    except (importlib.metadata.PackageNotFoundError, CheckpointError):
        return False
    return True


def _network(network: NetworkOptions, width: int) -> Any:
    from titans_pytorch import memory_models

    # Half a unit more, as the library rounds the product down.
    expansion = (network.hidden + 0.5) / width
    if network.kind == "mlp":
        return memory_models.MemoryMLP(width, network.depth, expansion)
    if network.kind == "gated-residual":
        return memory_models.GatedResidualMemoryMLP(width, network.depth, expansion)
    if network.kind == "factorized":
        return memory_models.FactorizedMemoryMLP(width, network.depth, network.hidden)
    return memory_models.MemorySwiGluMLP(width, network.depth, expansion * 3 / 2)


def _memory_arguments(options: MemoryOptions) -> dict[str, Any]:
    arguments = {name: value for name, value in vars(options).items() if name not in _NOT_ARGUMENTS}
    return arguments | {"activation": _ACTIVATIONS[options.activation]() if options.activation else None}


def _build(options: MemoryOptions | TransformerOptions) -> Any:
    import titans_pytorch

    if isinstance(options, MemoryOptions):
        network = _network(options.network, options.dim_head)
        return titans_pytorch.NeuralMemory(model=network, **_memory_arguments(options))
    memory = options.memory
    arguments = {name: value for name, value in vars(options).items() if name not in _NOT_ARGUMENTS}
    own = {name: value for name, value in _memory_arguments(memory).items() if name not in _OF_TRANSFORMER}
    return titans_pytorch.MemoryAsContextTransformer(
        **arguments,
        # Any value that the library rounds down to the inner width.
        ff_mult=(options.ff_hidden + 0.5) / options.dim * 3 / 2,
        neural_memory_segment_len=memory.chunk_size,
        neural_memory_batch_size=memory.batch_size,
        neural_memory_model=_network(memory.network, memory.dim_head),
        neural_memory_kwargs=own,
    )


def oracle_of(module: nn.Module, views: int = 1) -> Oracle:
    """The parallel forward of a module, computed in float64.

    It takes one stream's inputs: (1, T) tokens, or (1, T, views dim) vectors.
    """
    is_transformer = hasattr(module, "token_emb")

    def forward(inputs: Tensor) -> Tensor:
        # One row more, whose output is dropped: of a gated transition the library answers a stream's last row wrongly
        # where the gradient point moves there.
        inputs = torch.cat([inputs, inputs[:, -1:]], 1)
        with torch.no_grad(), Float64():
            if is_transformer:
                logits: Tensor = module(inputs, disable_flex_attn=True)
                return logits[:, :-1]
            given = torch.stack(inputs.chunk(views, -1)) if views > 1 else inputs
            retrieved: Tensor = module(given)[0]
            return retrieved[:, :-1]

    return forward


def library_oracle(source: Source) -> Oracle | None:
    """The oracle of a checkpoint, in float64; None if the library is not installed."""
    if not installed():
        return None
    module = _build(source.options)
    # Assigned, not copied: the library's initial memories are views of one head's.
    missing, unknown = module.load_state_dict(source.tensors, strict=False, assign=True)
    if wrong := [name for name in missing if "memory_model." not in name] + unknown:
        problem = f"internal error: titans-pytorch does not load the checkpoint's {wrong[0]!r}"
        raise CheckpointError("E1003", "checkpoint", problem, "report this with the checkpoint")
    views = 3 if isinstance(source.options, MemoryOptions) and source.options.qkv_receives_diff_views else 1
    # Float64 converts other parameters on use. Autograd and norms need operands of one dtype; a cache is written.
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and (tensor.dim() < 2 or "memory_model" in name or "cached_" in name):
            tensor.data = tensor.data.double()
    for part in module.modules():
        if isinstance(part, nn.RMSNorm) and part.eps is None:
            part.eps = NORM_EPS  # by default the dtype's, so another one in float64
    return oracle_of(module.eval(), views)
