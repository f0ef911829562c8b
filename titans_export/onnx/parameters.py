"""The parameters of a traced model: taken out of its graph without a copy, and mapped from a bundle's weights."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from ..safetensors_file import Array, map_float32
from .mapped import SMALL_BYTES
from .weights import PARAMETER_PREFIX


def take_large(model: ir.Model, numbers: Collection[int] = ()) -> dict[str, Array]:
    """Takes the values of large initialisers out of a traced model, without a copy. They become external data whose
    place is not known yet, as protobuf messages are limited to 2 GiB.

    numbers: of streams and slots that the model was traced for. Constants that repeat for each of them stay, as
    `free_streams` keeps a single part.
    """
    large: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        repeats = any(size % number == 0 for size in tensor.shape.numpy() for number in numbers if size)
        if tensor.nbytes >= SMALL_BYTES and not repeats:
            large[name] = tensor.numpy()
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return large


def map_parameters(model: nn.Module, path: Path) -> None:
    """Frees the memory of parameters whose values are in the file that `share_weights` wrote; they become mapped."""
    gc.collect()  # traces refer to parameters in cycles
    mapped = map_float32(path)
    for name, parameter in model.named_parameters():
        value = mapped.get(PARAMETER_PREFIX + name)
        if value is not None and parameter.dtype == torch.float32 and parameter.shape == value.shape:
            parameter.data = torch.from_numpy(value)
    return_free_memory()


def return_free_memory() -> None:
    """Returns freed memory to the system, if the C library can. glibc keeps what large temporary tensors leave."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
