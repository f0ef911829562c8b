"""What `titans-export quantize` was given, and where it keeps unfinished work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titans_calibration.recipe import Recipe

TOKENS = 1 << 15


@dataclass(frozen=True)
class QuantizeOptions:
    """One quantisation: bundle in, bundle out.

    output: None plans without writing. data: files; a recipe without ranges ignores them. tokens: at most so many are
    taken from all files together. seed: draws pieces of longer files. target: refuse recipes that it cannot run.
    encoding_errors: "strict" or "replace", for bytes that are not UTF-8 in text for a tokenizer file.
    """

    bundle: Path
    output: Path | None
    recipe: Recipe
    data: tuple[Path, ...] = ()
    tokens: int = TOKENS
    seed: int = 0
    overwrite: bool = False
    target: str | None = None
    encoding_errors: str = "strict"


def work_file(output: Path) -> Path:
    """Observations of an interrupted run, beside the output."""
    return output.with_name(f".{output.name}.calibration")


def sweep_file(output: Path) -> Path:
    """Measurements of an interrupted mixed sweep, beside the output."""
    return output.with_name(f".{output.name}.sweep")
