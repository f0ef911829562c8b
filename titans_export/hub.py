"""Checkpoints on the Hugging Face hub, named hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .errors import CheckpointError, MachineError, UsageError
from .names import is_plain

# A pathlib.Path makes one slash of two.
_ADDRESS = re.compile(r"hf:/{1,2}([^/@]+)/([^/@]+)(?:@([^@]+))?")
# Weights, their index, configuration and tokenizer. Nothing that could run code is fetched.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "config.json",
            "tokenizer.json")  # fmt: skip


def is_address(source: Path) -> bool:
    """Whether the path is an address of the hub."""
    return str(source).startswith("hf:/")


def fetch(source: Path, progress: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of a snapshot of the repository, in the hub's own cache; it is downloaded if it is not there.

    huggingface_hub's variables hold: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. Raises UsageError for a wrong
    address, MachineError without huggingface_hub, CheckpointError if the repository cannot be read.
    """
    found = _ADDRESS.fullmatch(str(source))
    if found is None or not all(is_plain(part) for part in found.group(1, 2)):
        problem = f"wrong address {source}: expected hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"
        raise UsageError("E0104", "hub", problem, "copy the name from the model's page")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MachineError("E1006", "hub", "cannot import huggingface_hub", "pip install huggingface-hub") from None
    name, revision = f"{found[1]}/{found[2]}", found[3]
    progress(f"fetching {name}{f' at {revision}' if revision else ''}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's own errors, and those of its network library
        reason = " ".join(str(error).split())[:300].rstrip(".")
        problem = f"cannot read {name}: {type(error).__name__}: {reason}"
        raise CheckpointError("E0318", "hub", problem, "check name, network and HF_TOKEN, or give a folder") from None
