"""What is in a bundle, without running it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from .bundle import Bundle, engines
from .schedule import offsets

OPERATOR_DOMAIN = "ai.titans"
_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """The facts, as `inspect --json` prints them. `bundle` has been read, so its files are whole."""
    manifest = bundle.manifest
    state = [_state(entry) for entry in manifest["state"]]
    return {
        "bundle": str(bundle.path),
        "schema_version": manifest["schema_version"],
        "producer": manifest["producer"],
        "model": manifest["model"],
        "input": manifest["input"],
        "output": manifest["output"],
        "vocab_size": manifest["input"].get("vocab_size"),
        "tokenizer": manifest["tokenizer"],
        "quantization": _quantization(bundle),
        "graphs": [
            {**entry, "offsets": offsets(entry), **_graph(bundle.path / entry["file"])} for entry in manifest["graphs"]
        ],
        "state": state,
        "state_bytes": sum(entry["bytes"] for entry in state),
        "files": _files(bundle),
        "hashes": "ok",
        "engines": engines(manifest),
        "targets": [{"backend": "onnxruntime", "device": "cpu"}, *_engine_targets(manifest)],
    }


def _quantization(bundle: Bundle) -> dict[str, Any] | None:
    """The manifest's entry, with how many products each format has; None of a bundle in float32."""
    entry = bundle.quantization
    if entry is None:
        return None
    return {**entry, "formats": dict(Counter(entry["matmuls"].values()).most_common())}


def _engine_targets(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Where the engines run, each once."""
    found = []
    for engine in engines(manifest):
        device = " ".join([engine["device"], *(f"sm_{sm}" for sm in engine["sm"])])
        target = {"backend": engine["compiler"], "device": device}
        if target not in found and device != "cpu":
            found.append(target)
    return found


def _state(entry: dict[str, Any]) -> dict[str, Any]:
    size = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 4)
    return {**{key: entry[key] for key in ("name", "role", "dtype", "shape")}, "bytes": size}


def _files(bundle: Bundle) -> list[dict[str, Any]]:
    sizes = {name: record["bytes"] for name, record in bundle.manifest["files"].items()}
    sizes["manifest.json"] = (bundle.path / "manifest.json").stat().st_size
    return [{"name": name, "bytes": count} for name, count in sorted(sizes.items(), key=lambda item: -item[1])]


def _graph(path: Path) -> dict[str, Any]:
    """What ONNX says about a graph: opset, operators in the graph itself, memory nodes, functions."""
    from .onnx.files import load_structure
    from .onnx.nodes import is_memory

    model = load_structure(path)
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "opset": next((entry.version for entry in model.opset_import if entry.domain == ""), None),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "neural_memory": [_memory_node(node) for node in model.graph.node if is_memory(node)],
        "functions": [f"{function.name}:{function.overload}" for function in model.functions],
    }


def _memory_node(node: Any) -> dict[str, Any]:
    from .onnx.nodes import attributes

    readable = {name: _readable(value) for name, value in attributes(node).items()}
    return {"name": node.name, "overload": node.overload, "attributes": readable}


def _readable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else list(value)
