"""The encoding of graph files: every parser of protocol buffers must read a graph alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from onnx import ModelProto

_FIX = "do not use this bundle unless you trust its author"
# The fields of onnx.proto that this project writes, by message. graph_check.cpp has the same; a test compares them.
FIELDS: dict[str, frozenset[int]] = {
    name: frozenset(numbers)
    for name, numbers in {
        "ModelProto": (1, 2, 3, 4, 5, 6, 7, 8, 14, 25),
        "OperatorSetIdProto": (1, 2),
        "StringStringEntryProto": (1, 2),
        "GraphProto": (1, 2, 5, 10, 11, 12, 13, 16),
        "FunctionProto": (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14),
        "NodeProto": (1, 2, 3, 4, 5, 6, 7, 8, 9),
        "AttributeProto": (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20, 21),
        "TensorProto": (1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14),
        "ValueInfoProto": (1, 2, 3),
        "TypeProto": (1,),
        "Tensor": (1, 2),
        "TensorShapeProto": (1,),
        "Dimension": (1, 2),
    }.items()
}
_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data")
_NUMBER = 18  # digits


def parse_model(raw: bytes, name: str) -> ModelProto:
    """The graph in the bytes of the file `name`.

    Raises BundleError unless it has known fields only, each of its own type, in ascending order, singular ones once and
    in the shortest form, so that it is the only encoding of what was read.
    """
    import onnx
    from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(raw)
        again = model.SerializeToString()
    except (DecodeError, EncodeError, UnicodeDecodeError) as error:
        raise _wrong(name, f"not an ONNX model: {error}") from None
    if again != raw:
        raise _wrong(name, "not an ONNX model: parsers could read it differently")
    _check_fields(model, name)
    return model


def _wrong(name: str, problem: str) -> BundleError:
    return BundleError("E0209", name, problem, _FIX)


def _check_fields(model: Any, name: str) -> None:
    from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

    waiting = [model]
    while waiting:
        message = waiting.pop()
        kind = message.DESCRIPTOR.name
        if len(UnknownFieldSet(message)):
            raise _wrong(name, f"not an ONNX model: an unknown field in {kind}")
        known = FIELDS.get(kind, frozenset())
        try:
            fields = message.ListFields()
            for field, value in fields:
                if field.number not in known:
                    raise _wrong(name, f"not an ONNX model: {kind}.{field.name}, which this project does not write")
                if field.message_type is not None:
                    waiting.extend([value] if hasattr(value, "ListFields") else value)
                elif field.type == field.TYPE_STRING:
                    _check_texts([value] if isinstance(value, (str, bytes)) else value, name, f"{kind}.{field.name}")
        except UnicodeDecodeError as error:
            raise _wrong(name, f"not an ONNX model: {error}") from None
        if kind == "TensorProto":
            _check_tensor(message, name)
        elif kind == "NodeProto" and len({one.name for one in message.attribute}) != len(message.attribute):
            raise _wrong(name, f"not an ONNX model: an attribute of {message.name!r} twice")


def _check_texts(texts: Iterable[Any], name: str, field: str) -> None:
    """Checks that texts are UTF-8. Some versions of protobuf read others, as bytes or with surrogates."""
    for text in texts:
        try:
            good = isinstance(text, str) and bool(text.encode() or True)
        except UnicodeEncodeError:
            good = False
        if not good:
            raise _wrong(name, f"not an ONNX model: {field} is not UTF-8")


def _check_tensor(tensor: Any, name: str) -> None:
    """Checks that the tensor's data lies in one place."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    external = tensor.data_location == tensor.EXTERNAL
    own = any(len(getattr(tensor, field)) for field in _DATA) or tensor.HasField("raw_data")
    if external != bool(entries) or (external and own):
        raise _wrong(name, f"data of {tensor.name!r} lies both in the file and outside, or nowhere")
    if not external:
        return
    if len(entries) != len(tensor.external_data) or "location" not in entries:
        raise _wrong(name, f"external data of {tensor.name!r} with a key twice, or without a file")
    for key, value in entries.items():
        if key in ("offset", "length"):
            if not (value.isascii() and value.isdigit() and len(value) <= _NUMBER):
                raise _wrong(name, f"{key} of the external data of {tensor.name!r} is no number: {value[:60]!r}")
        elif key not in ("location", "checksum"):
            raise _wrong(name, f"unknown key {key[:60]!r} of the external data of {tensor.name!r}")
