"""`titans-export serve`: streams over HTTP."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from ..errors import MachineError
from ..serve.config import SCOPES, Config, load, show
from .command import Command
from .options import PATH


def _settings(function: Any) -> Any:
    """Adds a flag for each setting. None: not given, so that a variable or the file decides."""
    for one in reversed(fields(Config)):
        assert one.default is not MISSING
        kind: Any = click.IntRange(one.metadata["low"]) if isinstance(one.default, int) else str
        text = one.metadata["help"] + ("" if one.default == "" else f"  [default: {one.default}]")
        flag = f"--{one.name.replace('_', '-')}"
        function = click.option(flag, one.name, type=kind, default=None, help=text, show_default=False)(function)
    return function


@click.command(
    cls=Command,
    bundles=True,
    foreign=False,
    examples=(
        "titans-export serve mac.titans",
        "titans-export serve mac.titans --store streams --port 9000",
        "titans-export serve mac.titans --host 0.0.0.0 --keys keys.toml --tls-cert cert.pem --tls-key key.pem",
        "titans-export serve --new-key alice >> keys.toml",
        "titans-export serve --print-config > serve.toml",
    ),
)
@click.argument("bundle", type=PATH, required=False)
@_settings
@click.option("--config", "file", type=PATH, metavar="FILE", help="TOML file of settings, named as the flags with _.")
@click.option("--print-config", is_flag=True, show_default=False, help="Print the settings and their sources as TOML.")
@click.option("--new-key", metavar="NAME", help="Print a new API key on stderr, and its entry for --keys on stdout.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(tuple(SCOPES)), help="Scopes of --new-key.")
def serve(
    bundle: Path | None,
    file: Path | None,
    print_config: bool,
    new_key: str | None,
    scopes: tuple[str, ...],
    **flags: Any,
) -> None:
    """Serve a bundle over HTTP, with streams that keep what they learned.

    The API is OpenAI's, and that of named streams; docs/serving.md describes it. A reply about a named stream is sent
    once the call is on disk. Settings come from flags, then TITANS_SERVE_* variables, then the file.
    """
    if new_key is not None:
        _print_key(new_key, scopes or tuple(SCOPES))
        return
    loaded = load(flags, os.environ, file)
    if print_config:
        click.echo(show(loaded))
        return
    if bundle is None:
        raise click.MissingParameter(param_hint="BUNDLE", param_type="argument", ctx=click.get_current_context())
    try:
        from ..serve.run import run
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("fastapi", "uvicorn", "pydantic", "starlette"):
            problem = f"cannot import {package}"
            raise MachineError("E1006", "serve", problem, "pip install 'titans-export[serve]'") from None
        raise
    run(bundle, loaded.config)


def _print_key(name: str, scopes: tuple[str, ...]) -> None:
    from ..serve.keys import new_key as make

    key, entry = make(name, scopes)
    click.echo(f"titans-export: the key of {name}, shown only now: {key}", err=True)
    click.echo(entry)
