"""External data files of a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BundleError

_FIX = "do not use this bundle unless you trust its author"


def check_external_data(path: Path, files: set[str]) -> None:
    """Raises BundleError if the graph's tensor data lies outside the graph file and the `files` beside it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise BundleError("E0209", "bundle", f"{path.name} is not an ONNX model: {error}", _FIX) from None
    for location in sorted(_locations(model)):
        if location not in files:
            problem = f"{path.name} refers to the file {location!r}, which is not a weights file of the manifest"
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
