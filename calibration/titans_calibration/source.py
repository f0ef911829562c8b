"""A float32 bundle with its graphs, each read from disk once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto

from titans_export.bundle import Bundle
from titans_export.errors import UsageError
from titans_export.onnx.files import load_structure
from titans_export.onnx.mapped import mapped


@dataclass(frozen=True)
class Source:
    """structures: graphs by name, large weights as references into the bundle's file. Not to be changed."""

    bundle: Bundle
    structures: dict[str, ModelProto]

    @cached_property
    def models(self) -> dict[str, ModelProto]:
        """The graphs with references to mapped weights. Not to be changed."""
        return {name: mapped(model, self.bundle.path) for name, model in self.structures.items()}

    def weight_names(self) -> set[str]:
        """The names of all initialisers."""
        return {tensor.name for model in self.structures.values() for tensor in model.graph.initializer}


def open_source(bundle: Bundle) -> Source:
    """Reads the structure of each graph. Raises UsageError if the bundle is quantised."""
    if bundle.quantization is not None:
        raise UsageError(
            "E0807", "quantize", f"{bundle.path} is already quantised", "give the float32 bundle that it was made from"
        )
    return Source(bundle, {name: load_structure(path) for name, path in bundle.graph_paths().items()})
