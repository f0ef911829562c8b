"""Every failure as one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys

import click

from ..errors import TitansError, error_line, os_error_fix
from ..names import shown

FAILED, USAGE, MACHINE = 1, 2, 4

# titans_runtime.Error.status to exit code. The runtime's "invalid argument" is invalid input data here.
_RUNTIME_STATUS = {1: FAILED, 2: FAILED, 4: MACHINE}


def explain(error: BaseException) -> tuple[str, int]:
    """The line for an error, and the exit code."""
    message, code = _explain(error)
    return shown(" ".join(message.split())), code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, TitansError):
        return str(error), error.exit_code
    if type(error).__module__.startswith("titans_runtime"):
        return str(error), _RUNTIME_STATUS.get(getattr(error, "status", 1), FAILED)
    if isinstance(error, click.ClickException):
        return _explain_usage(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return error_line("E1004", "interrupted", "a signal ended the command", "run it again"), FAILED
    if isinstance(error, ImportError):
        return _explain_import(error)
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        problem = f"cannot use {error.filename}: {reason}" if error.filename else f"input or output failed: {reason}"
        return error_line("E1001", "files", problem, os_error_fix(error)), FAILED
    if isinstance(error, MemoryError):
        return error_line("E1002", "memory", "out of memory", "close programs or use a larger machine"), FAILED
    problem = " ".join(f"internal error: {type(error).__name__}: {error}".split())[:500].rstrip(".")
    return error_line("E1003", "internal", problem, "report the output of the same command with --debug"), FAILED


def _explain_usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "titans-export"
    fix = f"see {command} --help"
    text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    if isinstance(error, click.NoSuchOption):
        if error.possibilities:
            fix = f"use {' or '.join(sorted(error.possibilities))}, or {fix}"
        return error_line("E0101", "usage", f"unknown option {error.option_name}", fix)
    if isinstance(error, click.MissingParameter):
        return error_line("E0103", "usage", text, fix)
    if isinstance(error, click.BadParameter):
        return error_line("E0104", "usage", text, fix)
    return error_line("E0101", "usage", text.replace("no such command", "unknown command"), fix)


def _explain_import(error: ImportError) -> tuple[str, int]:
    """A missing package counts as missing on this machine, also when a dependency of ours lacks it."""
    if str(error).startswith("[titans_runtime]"):  # already in the form of an error
        return str(error), MACHINE
    package = (error.name or "").partition(".")[0] or "a package"
    if package == "titans_export":
        return error_line(
            "E1005", "internal", f"incomplete installation: {error}", "install titans-export again"
        ), FAILED
    fix = f"pip install {package.replace('_', '-')}"
    return error_line("E1006", "packages", f"cannot import {package}: {error}", fix), MACHINE


def close_stdout() -> None:
    """Closes stdout after the reader of a pipe has gone, so that the interpreter writes nothing at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
