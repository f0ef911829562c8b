"""Options from variables, such as TITANS_RUN_DEVICE, and from one TOML file, such as `[run] device = "cuda"`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "TITANS_OPTIONS"
# `serve` has a file and variables of its own, and `streams` has subcommands.
_OWN = ("serve", "streams")


def prefix(command: str | None) -> str | None:
    """What the variables of a command's options begin with, None if it has none."""
    return None if command is None or command in _OWN else f"TITANS_{command.upper().replace('-', '_')}"


def file_option() -> click.Option:
    """`--options FILE` of the program."""
    return click.Option(
        ["--options"],
        type=click.Path(path_type=Path, dir_okay=False),
        envvar=VARIABLE,
        show_envvar=True,
        metavar="FILE",
        expose_value=False,
        callback=_read,
        help="TOML file with a table of options per command.",
    )


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:
        return
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # syntax, or bytes that are not UTF-8
        raise UsageError("E0105", "options", f"{path} is not TOML: {error}", "correct the file") from None
    assert isinstance(ctx.command, click.Group)
    ctx.default_map = {name: _table(ctx.command, str(path), name, table) for name, table in tables.items()}


def _table(program: click.Group, path: str, name: str, table: Any) -> dict[str, Any]:
    """The values of one command by parameter."""
    command = program.commands.get(name)
    if command is None or not isinstance(table, dict):
        problem = f"{path}: unknown command {name!r}"
        raise UsageError("E0105", "options", problem, f"use tables named as commands: {', '.join(program.commands)}")
    if prefix(name) is None:
        fix = "see titans-export serve --print-config" if name == "serve" else "give its options on the command line"
        raise UsageError("E0105", "options", f"{path}: {name} does not read this file", fix)
    known = {long.removeprefix("--"): option for option in command.params for long in option.opts if long[:2] == "--"}
    if unknown := [key for key in table if key not in known]:
        fix = f"see titans-export {name} --help"
        raise UsageError("E0105", "options", f"{path}: unknown option {unknown[0]!r} of {name}", fix)
    return {str(known[key].name): value for key, value in table.items()}
