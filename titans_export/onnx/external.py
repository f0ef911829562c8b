"""The files that a graph file sends its reader to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BundleError

_REMEDY = "do not use this bundle unless you know who made it"


def check_external_data(path: Path, files: set[str]) -> None:
    """Raises BundleError unless every tensor of the graph file has its data inside or in one of `files` beside it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise BundleError("bundle", f"an ONNX model in {path.name}", str(error), _REMEDY) from None
    for location in sorted(_locations(model)):
        if location not in files:
            known = " or ".join(sorted(files))
            raise BundleError("bundle", f"the data of {path.name} to be in it or in {known}", repr(location), _REMEDY)


def _locations(model: Any) -> set[str]:
    """Where data of tensors lies, wherever in the model they stand."""
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
