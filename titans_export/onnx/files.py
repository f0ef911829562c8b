"""Graph files and the weights beside them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model

from .nodes import copy_model

_EXTERNAL_BYTES = 1024  # smaller initialisers stay inside a graph's file


def load_structure(path: Path) -> onnx.ModelProto:
    """Loads the graph without its large weights, which stay references to files beside `path`."""
    return onnx.load(str(path), load_external_data=False)


def load_graph(path: Path) -> onnx.ModelProto:
    """Loads the graph with its weights. Functions are not inlined."""
    return load_weights(load_structure(path), path.parent)


def load_weights(structure: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of the structure with the weights loaded that it references in `folder`."""
    model = copy_model(structure)
    load_external_data_for_model(model, str(folder))
    return model


def write_graph(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the graph to `path` and its large weights beside it, because protobuf files are limited to 2 GiB."""
    data = path.with_suffix(".data")
    data.unlink(missing_ok=True)
    onnx.save_model(
        copy_model(model),  # saving turns the weights into references
        str(path),
        save_as_external_data=True,
        location=data.name,
        size_threshold=_EXTERNAL_BYTES,
    )
    if data.exists():
        data.chmod(path.stat().st_mode & 0o777)  # onnx creates it as private
    return path
