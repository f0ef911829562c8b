"""The parts that all commands share: `--json`, `--debug`, `-v`, `-q`, results, notes and exit codes."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from ..names import shown
from ..trust import Trust, trusting
from . import settings, verbosity
from .failures import FAILED, close_stdout, explain

NAME = "titans-export"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class Command(click.Command):
    """A command with `--debug`, `-v` and `-q`, variables for its options, and an example in its help.

    bundles: it opens bundles and has `--expect-sha256`. foreign: it then has `--allow-any-operator` too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.examples: tuple[str, ...] = kwargs.pop("examples", ())
        bundles, foreign = kwargs.pop("bundles", False), kwargs.pop("foreign", True)
        kwargs.setdefault("context_settings", CONTEXT)
        super().__init__(*args, **kwargs)
        self.context_settings = {"auto_envvar_prefix": settings.prefix(self.name), **self.context_settings}
        if bundles:
            self.params += [_expect_option(), *([_operator_option()] if foreign else [])]
        debug = click.Option(["--debug"], is_flag=True, help="Print the traceback of a failure.", show_default=False)
        debug.expose_value = False
        debug.callback = _remember_debug
        self.params += [*verbosity.options(), debug]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  {example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; `--debug` prints the traceback of a failure first."""
        try:
            with trusting(Trust(ctx.meta.get("expected", frozenset()), ctx.meta.get("any_operator", False))):
                return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get("debug") and not isinstance(error, click.exceptions.Exit):
                traceback.print_exc(file=sys.stderr)
            raise


def _expect_option() -> click.Option:
    def remember(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
        for digits in value:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
                raise click.BadParameter(f"expected 64 hexadecimal digits, got {digits[:80]!r}")
        ctx.meta["expected"] = frozenset(digits.lower() for digits in value)

    return click.Option(
        ["--expect-sha256"],
        multiple=True,
        metavar="HEX",
        expose_value=False,
        callback=remember,
        show_default=False,
        help="SHA-256 of the bundle, as inspect prints it; refuse any other. Once per bundle.",
    )


def _operator_option() -> click.Option:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta["any_operator"] = value
        if value:
            note("warning: graphs may have any operator, and some read and write memory outside of their tensors")

    return click.Option(
        ["--allow-any-operator"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        show_default=False,
        help="Open graphs with operators that titans-export does not write. For bundles of your own only.",
    )


class Interrupted(SystemExit):
    """Ends the program after Ctrl-C or SIGTERM, once unfinished output has been removed."""


class Program(click.Group):
    """The group of commands. It always ends with one of the documented exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and exits."""
        kwargs.update(standalone_mode=False)
        kwargs.setdefault("prog_name", NAME)
        verbosity.reset()
        try:
            _show_any_name()
            with _stopped_by_sigterm():
                code = super().main(*args, **kwargs)
                sys.stdout.flush()
        except BrokenPipeError:
            close_stdout()
            sys.exit(FAILED)
        except (Exception, KeyboardInterrupt) as error:
            message, code = explain(error)
            say(f"{NAME}: {message}", err=True)
            if isinstance(error, (KeyboardInterrupt, click.Abort)):
                raise Interrupted(code) from None
        sys.exit(code if isinstance(code, int) else 0)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the epilog with its line breaks as they are."""
        formatter.write(f"\n{self.epilog}\n")


def _show_any_name() -> None:
    """Lets stdout show names of files that its encoding lacks: their own bytes in UTF-8, else an escape."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        utf8 = stream.encoding.lower().replace("-", "") == "utf8"
        stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, show_default=False, help="Print one JSON object on stdout.")(
        function
    )


def to_json(result: dict[str, Any]) -> str:
    """The result as one JSON object. NaN and infinity become null, as JSON cannot hold them."""
    return json.dumps(_finite(result), indent=2, allow_nan=False)


def emit(result: dict[str, Any]) -> None:
    """Prints the result on stdout as one JSON object."""
    click.echo(to_json(result))


def say(text: str, err: bool = False) -> None:
    """Prints lines, with hidden characters as escapes: a terminal would obey those of a file."""
    click.echo(shown(text, keep="\n"), err=err)


def note(text: str) -> None:
    """Prints a note on stderr, unless the command is quiet."""
    if not verbosity.quiet():
        say(f"{NAME}: {text}", err=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["debug"] = value


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Handles SIGTERM like Ctrl-C: unfinished output is removed."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
