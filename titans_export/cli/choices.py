"""Option values with a list of names: completion in the shell, and the nearest name after a typing error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from ..checkpoint_formats import FORMATS

_SHORT = 3  # names that are all listed in an error
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


class Name(click.ParamType):  # type: ignore[type-arg]
    """One of some names, which are listed when they are needed.

    what: the kind of name, for errors. also: accepts values that are no names, such as files.
    """

    name = "name"

    def __init__(
        self, what: str, names: Callable[[], Iterable[str]], also: Callable[[str], bool] | None = None
    ) -> None:
        self._what, self._names, self._also = what, names, also

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value itself, or a usage error with the nearest names."""
        names = list(self._names())
        if value in names or (self._also is not None and self._also(value)):
            return value
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.6)
        short = len(names) <= _SHORT or not near
        known = f"expected one of {', '.join(names)}" if short else f"did you mean {' or '.join(near)}"
        self.fail(f"unknown {self._what} {value!r}: {known}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin like this; files too where a file is accepted."""
        found = [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]
        return found if found or self._also is None else [CompletionItem(incomplete, type="file")]


def _targets() -> list[str]:
    from ..engines.targets import TARGETS

    return list(TARGETS)


def _recipes() -> list[str]:
    from titans_calibration.recipe import recipe_names

    return recipe_names()


FORMAT = Name("format", lambda: FORMATS)
TARGET = Name("target", _targets)
RECIPE = Name("recipe", _recipes, also=lambda value: value.endswith(".toml"))
DEVICE = Name("device", lambda: ("cpu", "cuda", "cuda:0"), also=lambda value: _DEVICE.fullmatch(value) is not None)
