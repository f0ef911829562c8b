"""The contents of a bundle, without running it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, Bundle
from .dtypes import tensor_bytes
from .manifest import Manifest, StateTensor, plain
from .trust import bundle_sha256


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """The contents as `inspect --json` prints them."""
    manifest = bundle.manifest
    state = [_state(entry) for entry in manifest.state]
    return {
        "bundle": str(bundle.path),
        "schema_version": manifest.schema_version,
        "producer": manifest.producer,
        "model": manifest.model.to_json(),
        "input": manifest.input.to_json(),
        "output": manifest.output.to_json(),
        "vocab_size": manifest.input.vocab_size,
        "tokenizer": manifest.tokenizer.to_json(),
        "stability": manifest.stability.to_json() if manifest.stability else None,
        "quantization": _quantization(bundle),
        "guard": plain(manifest.guard),
        "graphs": [
            {**graph.to_json(), "offsets": list(graph.offsets), **_graph(bundle.path / graph.file)}
            for graph in manifest.graphs
        ],
        "state": state,
        "state_bytes": sum(entry["bytes"] for entry in state),
        "files": _files(bundle),
        "hashes": "ok",
        "sha256": bundle_sha256(bundle.path, manifest),
        "engines": plain(manifest.engines),
        "targets": [{"backend": "onnxruntime", "device": "cpu"}, *_engine_targets(manifest)],
    }


def _quantization(bundle: Bundle) -> dict[str, Any] | None:
    """The manifest's entry with the number of matmuls in each format; None for a float32 bundle."""
    entry = bundle.quantization
    if entry is None:
        return None
    return {**entry.to_json(), "formats": dict(Counter(entry.matmuls.values()).most_common())}


def _engine_targets(manifest: Manifest) -> list[dict[str, str]]:
    """The devices that engines run on, each once."""
    found = []
    for engine in manifest.engines:
        device = " ".join([engine.device, *(f"sm_{sm}" for sm in engine.sm)])
        target = {"backend": engine.compiler, "device": device}
        if target not in found and device != "cpu":
            found.append(target)
    return found


def _state(entry: StateTensor) -> dict[str, Any]:
    size = tensor_bytes(entry.shape, entry.dtype)
    return {"name": entry.name, "role": entry.role, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": size}


def _files(bundle: Bundle) -> list[dict[str, Any]]:
    sizes = {name: record.bytes for name, record in bundle.manifest.files.items()}
    sizes[MANIFEST] = (bundle.path / MANIFEST).stat().st_size
    return [{"name": name, "bytes": count} for name, count in sorted(sizes.items(), key=lambda item: -item[1])]


def _graph(path: Path) -> dict[str, Any]:
    """A graph's opset, operators outside of functions, memory nodes and functions."""
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
    return {"name": node.name, "operator": node.op_type, "overload": node.overload, "attributes": readable}


def _readable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else list(value)
