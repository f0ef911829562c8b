"""What every checkpoint format is read into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..model import Titans


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode and where it came from."""

    model: Titans
    format: str
    weights_sha256: str
    tokenizer: Path | None
