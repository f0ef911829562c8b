"""Tensors by name, read when they are asked for, so that a checkpoint is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its shape, its dtype, and a function that reads it."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    layout: torch.layout = torch.strided


class NamedTensors(Mapping[str, Tensor]):
    """A mapping from names to tensors. Each access reads the tensor again; shapes and dtypes need no access."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> NamedTensors:
        """The tensors of any mapping. One of this class is returned as it is."""
        return tensors if isinstance(tensors, cls) else cls({name: _entry(value) for name, value in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> list[str]:
        """The names of all dtypes, such as "bfloat16", sorted."""
        return sorted({dtype_name(entry.dtype) for entry in self.entries.values()})

    def float32(self) -> NamedTensors:
        """The same tensors, which become contiguous float32 in memory of the CPU at each access."""
        return NamedTensors({name: _converted(entry) for name, entry in self.entries.items()})

    def select(self, names: Mapping[str, str]) -> NamedTensors:
        """The tensors under other names. names: new name to present name."""
        return NamedTensors({new: self.entries[old] for new, old in names.items()})


def under(tensors: Mapping[str, Tensor], prefix: str) -> NamedTensors:
    """The tensors whose names begin with the prefix, with the prefix removed."""
    found = NamedTensors.of(tensors)
    return found.select({name.removeprefix(prefix): name for name in found if name.startswith(prefix)})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def all_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite. Allocates nothing of the tensor's size."""
    if value.numel() == 0:
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _entry(value: Tensor) -> TensorEntry:
    return TensorEntry(tuple(value.shape), value.dtype, lambda: value, value.layout)


def _converted(entry: TensorEntry) -> TensorEntry:
    def read() -> Tensor:
        return entry.read().detach().to("cpu", torch.float32).contiguous()

    return replace(entry, dtype=torch.float32, read=read)
