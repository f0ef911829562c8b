"""The constructor's arguments of a live module, read back from its attributes."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from .config import ACTIVATIONS, CLASSES, KWARGS, check_version
from .source import Source, assemble

_ACTIVATIONS = dict(zip(ACTIVATIONS, (nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid), strict=True))
_NAME = "the module"


def from_module(module: nn.Module) -> Source:
    """A live MemoryAsContextTransformer or NeuralMemory. Raises CheckpointError for unsupported parts, by name."""
    import titans_pytorch

    version = importlib.metadata.version("titans-pytorch")
    check_version(version, "the installed package")
    if type(module) is titans_pytorch.MemoryAsContextTransformer:
        contents = _transformer(module, titans_pytorch)
    elif type(module) is titans_pytorch.NeuralMemory:
        contents = {"class": "NeuralMemory"} | _memory(module, titans_pytorch)
    else:
        problem = f"unsupported module: expected a {' or '.join(CLASSES.values())}, got {type(module).__name__}"
        raise CheckpointError("E0312", "module", problem, "give the library's own module")
    contents["version"] = version
    tensors = dict(module.state_dict())
    return assemble(_NAME, contents, tensors, _digest(tensors))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _custom(what: str, got: object) -> CheckpointError:
    named = getattr(got, "__name__", type(got).__name__)
    problem = f"unsupported {what}: expected the library's own, got {named}"
    return CheckpointError("E0312", "module", problem, "train with the library's own, as other code cannot be exported")


def _transformer(module: Any, library: Any) -> dict[str, Any]:
    if type(module.token_emb) is not nn.Embedding or module.token_emb.max_norm is not None:
        raise _custom("token_emb", module.token_emb)
    memories = [_memory(layer[4], library) for layer in module.layers if layer[4] is not None]
    if any(memory != memories[0] for memory in memories):
        raise CheckpointError(
            "E0312", "module", "memory layers with different options", "train them with the same options"
        )
    memory = memories[0] if memories else {}
    spec = {"neural_memory_model": memory.pop("model")} if "model" in memory else {}
    return {
        **spec,
        "class": "MemoryAsContextTransformer",
        "segment_len": module.segment_len,
        "neural_memory_segment_len": module.neural_memory_segment_len,
        "num_longterm_mem_tokens": module.num_longterm_mem_tokens,
        "num_persist_mem_tokens": module.num_persist_mem_tokens,
        "neural_memory_batch_size": memory.pop("batch_size", None),
        "neural_mem_gate_attn_output": module.gate_attn_output,
        "neural_mem_weight_residual": module.neural_mem_weight_residual,
        "sliding_window_attn": module.sliding_window_attn,
        KWARGS: {key: value for key, value in memory.items() if key not in ("chunk_size", "qkv_receives_diff_views")},
    }


def _memory(module: Any, library: Any) -> dict[str, Any]:
    """The arguments that the tensors do not determine."""
    if type(module) is not library.NeuralMemory:
        raise _custom("NeuralMemory", module)
    if module.store_memory_loss_fn is not library.neural_memory.default_loss_fn:
        raise _custom("store_memory_loss_fn", module.store_memory_loss_fn)
    step = module.adaptive_step_transform
    own = isinstance(step, functools.partial) and step.func is library.neural_memory.default_adaptive_step_transform
    if not own or step.args or set(step.keywords) != {"max_lr"}:
        raise _custom("adaptive_step_transform", step)
    network = module.memory_model
    if type(network) is library.memory_models.ResidualNorm:
        network = network.model
    names = ("MemoryMLP", "GatedResidualMemoryMLP", "FactorizedMemoryMLP", "MemorySwiGluMLP", "MemoryAttention")
    if type(network) not in [getattr(library, name) for name in names]:
        raise _custom("memory network (model)", network)
    chunk = module.chunk_size
    return {
        **_network_spec(network, library),
        "chunk_size": list(chunk) if isinstance(chunk, tuple) else chunk,
        "batch_size": module.batch_size,
        "qkv_receives_diff_views": module.qkv_receives_diff_views,
        "default_step_transform_max_lr": step.keywords["max_lr"],
        "max_mem_layer_modulation": module.max_mem_layer_modulation,
        "max_grad_norm": module.max_grad_norm,
        "activation": _activation(module),
        "spectral_norm_surprises": module.spectral_norm_surprises,
        "store_with_lookahead_value": module.store_with_lookahead_value,
        "use_accelerated_scan": module.use_accelerated_scan,
        "heads": module.heads,
        "num_kv_per_token": module.num_kv_per_token,
        "per_head_learned_parameters": module.per_head_learned_parameters,
    }


def _network_spec(network: Any, library: Any) -> dict[str, Any]:
    """Of networks whose tensors could be another's."""
    if type(network) is library.MemoryAttention:
        return {"model": {"type": "MemoryAttention"}}
    square = type(network) is library.MemoryMLP and all(len(set(weight.shape)) == 1 for weight in network.weights)
    return {"model": {"type": "MemoryMLP", "expansion_factor": 1}} if square and len(network.weights) == 5 else {}


def _activation(module: Any) -> str | None:
    projections = (module.to_queries, module.to_keys, module.to_values)
    if all(type(projection) is nn.Linear for projection in projections):
        return None
    for projection in projections:
        if (
            not isinstance(projection, nn.Sequential)
            or len(projection) != 2
            or projection[1] is not module.to_queries[1]
        ):
            raise _custom("projections to queries, keys and values", projection)
    activation = module.to_queries[1]
    name = next((name for name, kind in _ACTIVATIONS.items() if type(activation) is kind), None)
    if name is None or getattr(activation, "approximate", "none") != "none":
        problem = f"unsupported activation: expected one of {', '.join(ACTIVATIONS)} (exact gelu), got {activation!r}"
        raise CheckpointError("E0312", "module", problem, "train with one of these")
    return name
