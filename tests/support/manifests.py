"""Small manifests, as JSON and typed, for tests that need no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_export.bundle import Bundle
from titans_export.manifest import Manifest, StateTensor


def manifest_json(
    vectors: bool = False, size: int = 256, graphs: Sequence[tuple[str, int, int]] = (("decode", 1, 1),), **keys: Any
) -> dict[str, Any]:
    """A valid manifest without state. `graphs` are names, tokens and strides; `keys` replace keys of the manifest."""
    names = {"vectors": "x", "outputs": "y"} if vectors else {"tokens": "tokens", "logits": "logits"}
    consumed = {"kind": "vectors", "name": "x", "dtype": "float32", "size": size}
    given = {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": size}
    listed = [
        {"name": name, "file": f"{name}.onnx", "tokens": tokens, "stride": stride, "weights": []}
        for name, tokens, stride in graphs
    ]
    files = ["golden.safetensors", "weights.safetensors", "state.safetensors", *(graph["file"] for graph in listed)]
    return {
        "format": "titans-bundle",
        "schema_version": 2,
        "producer": "a test",
        "model": {"name": "small", "variant": "none", "parameters": 0},
        "input": consumed if vectors else given,
        "output": {
            "kind": "vectors" if vectors else "logits",
            "name": names.get("outputs", "logits"),
            "dtype": "float32",
            "size": size,
        },
        "controls": {"position": "position", "learn": "learn"},
        "tokenizer": {"kind": "none" if vectors else "bytes"},
        "state": [],
        "graphs": listed,
        "golden": {"file": "golden.safetensors", **names, "tolerance": 1e-4},
        "weights": {"file": "weights.safetensors"},
        "initial_state": {"file": "state.safetensors"},
        "files": {name: {"bytes": 0, "xxh3_128": "0" * 32} for name in files},
        **keys,
    }


def bundle_of(*args: Any, path: Path = Path("none"), **keys: Any) -> Bundle:
    """A bundle with such a manifest and no files."""
    return Bundle(path, Manifest.from_json(manifest_json(*args, **keys)))


def state_tensor(name: str, **keys: Any) -> StateTensor:
    """A state tensor whose graph output is `name`.next."""
    entry = {"name": name, "input": name, "output": f"{name}.next", "dtype": "float32", "shape": [1], "role": "memory"}
    return StateTensor.from_json({**entry, **keys})
