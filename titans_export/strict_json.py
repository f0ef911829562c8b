"""JSON that every reader understands alike. The runtime's reader, base/json_reader.cpp, has the same rules."""

from __future__ import annotations

import json
import math
from typing import Any

from .names import LONGEST_KEY, is_text

DEEPEST = 64  # levels
MOST_VALUES = 1 << 20


def loads(raw: bytes | str, plain: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError for a text that is not JSON or that readers could understand
    differently.

    Refused are invalid UTF-8, a byte order mark, a key twice in one object, NaN, infinity, -0 as an integer, integers
    beyond 64 bits, floats beyond float64, and more than 64 levels or 2^20 values. plain: also long keys, and hidden
    characters in any string.
    """
    text = raw if isinstance(raw, str) else raw.decode("utf-8")
    # Counts commas in strings too, which is quick and the same in C++.
    if (count := sum(text.count(mark) for mark in ",[{")) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values: {count} commas and brackets")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
        )
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {DEEPEST} levels") from None
    _check(value, DEEPEST, plain)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {json.dumps(key)} twice in one object")
            seen.add(key)
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) <= 20 and digits != "-0" and -(1 << 63) <= (value := int(digits)) < 1 << 64:
        return value
    raise ValueError(f"{digits[:30]} is not an integer of 64 bits")


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:30]} is beyond float64")
    return value


def _check(value: Any, levels: int, plain: bool) -> None:
    if isinstance(value, str):
        if plain and not is_text(value):
            raise ValueError(f"hidden characters in the string {json.dumps(value)[:60]}")
    elif isinstance(value, dict):
        _check_level(levels)
        for key, one in value.items():
            if plain and (not is_text(key) or len(key.encode()) > LONGEST_KEY):
                problem = f"expected a key of at most {LONGEST_KEY} bytes without hidden characters"
                raise ValueError(f"{problem}, got {json.dumps(key)[:60]}")
            _check(one, levels - 1, plain)
    elif isinstance(value, list):
        _check_level(levels)
        for one in value:
            _check(one, levels - 1, plain)


def _check_level(levels: int) -> None:
    if levels < 1:
        raise ValueError(f"JSON nested deeper than {DEEPEST} levels")
