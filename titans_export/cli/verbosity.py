"""How much a command prints on stderr, and whether it prints details: `-q` and `-v`."""

from __future__ import annotations

from contextvars import ContextVar

import click

_details: ContextVar[bool] = ContextVar("details", default=False)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def details() -> bool:
    """Whether the user wants details, by `-v`."""
    return _details.get()


def quiet() -> bool:
    """Whether the user wants neither notes nor progress, by `-q`."""
    return _quiet.get()


def reset() -> None:
    """Forgets what an earlier command of this process was given."""
    _details.set(False)
    _quiet.set(False)


def options() -> list[click.Option]:
    """`-v` and `-q`. They set the level and are no arguments of the command."""
    return [
        _flag(_details, "-v", "--verbose", "Print details."),
        _flag(_quiet, "-q", "--quiet", "Print no notes and no progress; errors only."),
    ]


def _flag(level: ContextVar[bool], short: str, long: str, text: str) -> click.Option:
    def remember(_: click.Context, __: click.Parameter, value: bool) -> None:
        if value:
            level.set(True)

    return click.Option(
        [short, long], is_flag=True, expose_value=False, callback=remember, show_default=False, help=text
    )
