"""Graph files and the weights beside them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model

from ..files import utf8_path
from .nodes import copy_model


def load_structure(path: Path) -> onnx.ModelProto:
    """Loads the graph without its large weights, which stay references to files beside `path`."""
    with path.open("rb") as file:
        return onnx.load(file, load_external_data=False)


def load_graph(path: Path) -> onnx.ModelProto:
    """Loads the graph with its weights. Functions are not inlined."""
    return load_weights(load_structure(path), path.parent)


def load_weights(structure: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of the structure with the weights loaded that it references in `folder`."""
    model = copy_model(structure)
    with utf8_path(folder) as name:
        load_external_data_for_model(model, name)
    return model
