"""External data files of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from onnx import ModelProto

_FIX = "do not use this bundle unless you trust its author"


def check_external_data(model: ModelProto, name: str, files: set[str]) -> None:
    """Raises BundleError if tensor data of the graph in the file `name` lies outside it and the `files` beside it."""
    for location in sorted(_locations(model)):
        if location not in files:
            problem = f"{name} refers to the file {location!r}, which is not a weights file of the manifest"
            raise BundleError("E0208", "bundle", problem, _FIX)


def _locations(model: Any) -> set[str]:
    """Files with external tensor data, anywhere in the model."""
    import onnx

    found: set[str] = set()
    waiting = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):
            found.update(entry.value for entry in message.external_data if entry.key == "location")
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)
    return found
