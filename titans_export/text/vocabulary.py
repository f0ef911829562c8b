"""The vocabulary of a tokenizer file beside that of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def check_vocabulary(path: Path, size: int) -> list[str]:
    """Notes on the differences between a `tokenizer.json` and a model of `size` tokens.

    Raises CheckpointError if the file is damaged, or if the vocabulary itself exceeds the model's. Added tokens beyond
    it are only noted: many checkpoints have some that the model never saw.
    """
    try:
        spec = json.loads(path.read_bytes())
        known = spec["model"]["vocab"]
        base = {name: int(id) for name, id in known.items()} if isinstance(known, dict) else _numbered(known)
        added = {str(token["content"]): int(token["id"]) for token in spec.get("added_tokens") or ()}
    except OSError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"damaged file {path}: {type(error).__name__}: {error}"
        raise CheckpointError("E0302", "tokenizer", problem, "save the tokenizer again, or remove the file") from None
    base = {name: id for name, id in base.items() if name not in added}
    if beyond := sorted((id, name) for name, id in base.items() if id >= size):
        raise CheckpointError(
            "E0314",
            "tokenizer",
            f"{path.name} has {len(beyond)} tokens beyond the model's vocabulary of {size}, such as "
            f"{beyond[0][1]!r} ({beyond[0][0]})",
            "give the tokenizer that the model was trained with, or remove the file",
        )
    notes = []
    if beyond := sorted((id, name) for name, id in added.items() if id >= size):
        notes.append(
            f"{path.name} has {len(beyond)} added tokens beyond the model's vocabulary of {size}, such as "
            f"{beyond[0][1]!r} ({beyond[0][0]}): text that holds one is refused"
        )
    used = {*base.values(), *added.values()}
    if missing := [id for id in range(size) if id not in used]:
        notes.append(
            f"{len(missing)} of the model's {size} tokens have no text in {path.name}, the first is {missing[0]}: "
            "if the model generates one, nothing is shown"
        )
    return notes


def _numbered(vocabulary: Any) -> dict[str, int]:
    """The vocabulary of a Unigram model, a list of tokens and scores."""
    return {str(token): id for id, (token, _) in enumerate(vocabulary)}
