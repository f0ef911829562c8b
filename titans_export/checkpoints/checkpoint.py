"""What every checkpoint format is read into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..model import StreamModel


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say beside the path.

    config: a JSON file, or a name that the format knows, for formats whose checkpoints hold no configuration.
    bug_compatible: compute what the format's own library decodes after a prompt of so many tokens where that differs
    from what it trained; None: what it trained.
    """

    config: str | None = None
    bug_compatible: int | None = None


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
