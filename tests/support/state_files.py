"""State files made without the runtime, by their format alone, for numbers that a test knows beforehand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

Fields = Mapping[str, np.ndarray]


def kind_of(name: str) -> str:
    """The kind of a field of the operators' rows, by its name."""
    for pattern, kind in (
        (r"W\d+|gamma", "weights"), (r"G(\d+|_gamma)", "gradient_point"), (r"S(\d+|_gamma)", "surprise"),
        (r"E[WS].*", "rounding_error"), (r"[eamf]|beta", "coefficient"), (r"chunk_updates", "update_count"),
    ):  # fmt: skip
        if re.fullmatch(pattern, name):
            return kind
    return "open_chunk"


def layout_of(fields: Fields) -> tuple[list[dict[str, Any]], int]:
    """A float32 row's layout and words; each field is (heads, *shape)."""
    layout, offset = [], 0
    for name, values in fields.items():
        layout.append({"name": name, "offset": offset, "shape": list(values.shape[1:]), "kind": kind_of(name)})
        offset += int(np.prod(values.shape[1:]))
    return layout, -(-offset // 16) * 16


def memory_entry(name: str, layout: Sequence[Mapping[str, Any]], heads: int, words: int) -> dict[str, Any]:
    entry = {"name": name, "role": "memory", "dtype": "float32", "shape": [1, heads, words], "layout": list(layout)}
    return entry | ({"operator": "NeuralMemory"} if any(field["name"] == "e" for field in layout) else {})


def write_state(path: Path, memories: Mapping[str, Fields], others: Fields | None = None, **metadata: Any) -> Path:
    """A plain state file of memories in float32, each field (heads, *shape), and of other tensors."""
    entries, tensors = [], {}
    for name, fields in memories.items():
        layout, words = layout_of(fields)
        heads = len(next(iter(fields.values())))
        row = np.zeros((1, heads, words), np.float32)
        for entry in layout:
            values = np.asarray(fields[entry["name"]], np.float32).reshape(heads, -1)
            row[0, :, entry["offset"] : entry["offset"] + values.shape[1]] = values
        entries.append(memory_entry(name, layout, heads, words))
        tensors[name] = row
    for name, values in (others or {}).items():
        entries.append({"name": name, "role": "cache", "dtype": "float32", "shape": list(values.shape)})
        tensors[name] = values
    return write_rows(path, entries, tensors, **metadata)


def write_rows(
    path: Path, entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, np.ndarray], **metadata: Any
) -> Path:
    """A plain state file of tensors as they are, sealed with its hash."""
    texts = {
        "format": "titans-state",
        "schema_version": "2",
        "producer": "test 1.0",
        "created": "2026-11-24T12:00:00Z",
        "model": json.dumps({"name": "by-hand", "variant": "lmm", "weights_sha256": "ab" * 32}),
        "position": "64",
        "learning": "true",
        "memory": json.dumps({"dtype": "float32", "rounding": "nearest", "seed": 0}),
        "backend": "none",
        "device": "none",
        "state": json.dumps(entries),
        "xxh3_128": "0" * 32,
    }
    texts |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    whole = dict(tensors)
    if texts["position"] != "0":
        whole.setdefault("last_output", np.zeros(4, np.float32))
    raw = save(whole, texts)
    key = b'"xxh3_128":"'
    assert raw.count(key + b"0" * 32) == 1
    path.write_bytes(raw.replace(key + b"0" * 32, key + xxhash.xxh3_128_hexdigest(raw).encode()))
    return path
