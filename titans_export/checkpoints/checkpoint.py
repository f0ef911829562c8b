"""What every checkpoint format is read into."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..model import StreamModel
from ..named_tensors import NamedTensors, all_finite, dtype_name
from .weights import Weights

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say beside the path.

    config: a JSON file, or a name that the format knows, for formats whose checkpoints hold no configuration.
    bug_compatible: compute what the format's own library decodes after a prompt of so many tokens where that differs
    from what it trained; None: what it trained.
    weights: the state dict to read where a file has several, such as "ema"; None: the model's own.
    library_defaults: take the library's default for arguments that neither tensors nor configuration determine.
    """

    config: str | None = None
    bug_compatible: int | None = None
    weights: str | None = None
    library_defaults: bool = False


@dataclass(frozen=True)
class Origin:
    """What was read, for reports and manifests.

    files: names of the files. weights: address of the state dict, None where there is only one. found: all addresses,
    if there are several. dtypes: those of the saved tensors. library_defaults: arguments that were filled in. notes:
    lines for the user.
    """

    files: tuple[str, ...] = ()
    weights: str | None = None
    found: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    library_defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, weights: Weights, tensors: NamedTensors, library_defaults: Mapping[str, Any] | None = None) -> Origin:
        """The origin of the tensors that were taken from `weights`."""
        found = weights.found if len(weights.found) > 1 else ()
        dtypes, notes, defaults = tuple(tensors.dtypes), list(weights.notes), library_defaults or {}
        if rounded := [name for name in dtypes if name != "float32"]:
            how = "rounded to float32" if "float64" in rounded else "converted to float32 exactly"
            notes.append(f"weights in {' and '.join(dtypes)} are {how}")
        if defaults:
            filled = ", ".join(f"{name} = {json.dumps(value)}" for name, value in defaults.items())
            notes.append(f"the library's defaults are used for {filled}")
        return cls(tuple(file.name for file in weights.files), weights.address, found, dtypes, defaults, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, without the notes."""
        return {
            "files": list(self.files),
            "weights": self.weights,
            "found": list(self.found),
            "dtypes": list(self.dtypes),
            "library_defaults": dict(self.library_defaults),
        }


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode and where it came from.

    oracle: makes what the format's own library computes of a whole stream, (1, T, ...) to (1, T, size) in float64, or
    gives None where it is not installed. None where there is no such library.
    """

    model: StreamModel
    format: str
    weights_sha256: str
    tokenizer: Path | None
    oracle: Callable[[], Callable[[Tensor], Tensor] | None] | None = None
    origin: Origin = field(default_factory=Origin)


def check_values(tensors: NamedTensors) -> None:
    """Raises CheckpointError unless all tensors are dense, finite floats of 16 bits or more, also as float32."""
    for name, entry in tensors.entries.items():
        dense = str(entry.layout) == "torch.strided"
        got = dtype_name(entry.dtype) if dense else str(entry.layout).removeprefix("torch.")
        if got not in FLOATS:
            problem = f"wrong dtype of tensor {name}: expected float32, float64, float16 or bfloat16, got {got}"
            fix = "give the checkpoint from before it was quantised or packed"
            raise CheckpointError("E0306", "checkpoint", problem, fix)
        value = entry.read().detach()
        if not all_finite(value.float() if got == "float64" else value):
            problem = f"NaN or infinity in tensor {name}"
            raise CheckpointError("E0307", "checkpoint", problem, "give an earlier checkpoint")
