"""Stand-ins for classes that trainers save beside tensors: NumPy scalars and arrays, arguments, paths, times.

Each stand-in only keeps the values. So nothing of the saved class runs, and its package need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = "biufcSU"  # of NumPy: booleans, numbers and texts


class Record:
    """The attributes of an object, such as an argparse.Namespace."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("attributes that are not a dictionary")
        self.values = {str(name): value for name, value in state.items()}


class _Namespace(Record):
    """One made without a call of its constructor."""

    def __new__(cls) -> _Namespace:
        made = super().__new__(cls)
        made.values = {}
        return made


class _Dtype:
    """A NumPy dtype of a plain kind."""

    def __init__(self, code: Any = "f8", *_: Any) -> None:
        self.dtype = np.dtype(str(code) if not isinstance(code, bytes) else code.decode())
        if self.dtype.kind not in _KINDS or self.dtype.hasobject:
            raise ValueError(f"an array of {self.dtype}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array of a plain kind."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray[Any, Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        value = np.frombuffer(_bytes(data), dtype.dtype)
        self.value = value.reshape(tuple(shape), order="F" if fortran else "C").astype(
            dtype.dtype.newbyteorder("="), order="C"
        )


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else bytes(data, "latin1")


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return np.frombuffer(_bytes(data), dtype.dtype)[0].item()


def _array_class(*_: Any) -> None:
    """Stands for numpy.ndarray, which only appears as an argument."""


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


def _factory(*_: Any) -> None:
    """Stands for the type of a defaultdict's values."""


def _path(*parts: Any) -> str:
    return "/".join(map(str, parts)).replace("//", "/")


def _text(*parts: Any) -> str:
    return " ".join(map(str, parts))


class _Version:
    """A text with methods, which becomes a plain one."""

    def __new__(cls, *parts: Any) -> str:  # type: ignore[misc]
        return _text(*parts)


class _Dictionary:
    """A dictionary with attributes, which becomes a plain one."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


_STAND_INS: dict[str, tuple[str, ...]] = {
    "_Namespace": ("argparse.Namespace", "types.SimpleNamespace"),
    "_Dtype": ("numpy.dtype",),
    "Array": ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    "_array_class": ("numpy.ndarray",),
    "_scalar": ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
    "_dictionary": ("collections.defaultdict",),
    "_factory": ("builtins.list", "builtins.dict", "builtins.int", "builtins.float", "builtins.str", "builtins.bool"),
    "_path": tuple(
        f"{module}.{kind}"
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")
    ),
    "_text": ("datetime.datetime", "datetime.date", "datetime.timedelta"),
    "_Version": ("torch.torch_version.TorchVersion",),
    "_Dictionary": (
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ),
}


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Pairs of a stand-in and the full name of what it stands for, for `torch.serialization.safe_globals`."""
    return [(globals()[own], name) for own, names in _STAND_INS.items() for name in names]


def harmless_names() -> set[str]:
    """The full names of what has a stand-in."""
    return {name for names in _STAND_INS.values() for name in names}


def plain(value: Any) -> Any:
    """The value with records as dictionaries, and arrays as NumPy's. What occurs twice is converted once."""
    done: dict[int, Any] = {}

    def convert(one: Any) -> Any:
        if id(one) in done:
            return done[id(one)]
        inner = one.values if isinstance(one, Record) else one
        if isinstance(inner, Array):
            return inner.value
        made: Any
        if isinstance(inner, dict):
            made = done[id(one)] = {}
            made.update((name, convert(item)) for name, item in inner.items())
        elif isinstance(inner, (list, tuple)):
            made = done[id(one)] = []
            made.extend(convert(item) for item in inner)
        else:
            made = inner
        return made

    return convert(value)
