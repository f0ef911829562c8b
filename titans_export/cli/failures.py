"""What a command ends with: every failure as one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import sys

import click

from ..errors import TitansError

FAILED, USAGE, MACHINE = 1, 2, 4

# titans_runtime.Error.status to exit code: a wrong argument to the runtime is, here, wrong input data.
_RUNTIME_STATUS = {1: FAILED, 2: FAILED, 4: MACHINE}

_OS_REMEDIES = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "choose a place that takes files of this size",
    errno.EACCES: "check the permissions or choose another place",
    errno.EPERM: "check the permissions or choose another place",
    errno.EROFS: "choose a place you may write to",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "check the path",
}


def explain(error: BaseException) -> tuple[str, int]:
    """The one line that says what went wrong and what to do, and the exit code."""
    message, code = _explain(error)
    return " ".join(message.split()), code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, TitansError):
        return str(error), error.exit_code
    if type(error).__module__.startswith("titans_runtime"):
        return str(error), _RUNTIME_STATUS.get(getattr(error, "status", 1), FAILED)
    if isinstance(error, click.ClickException):
        return _explain_usage(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "[interrupted] expected to finish but got a signal to stop; run it again", FAILED
    if isinstance(error, ImportError):
        return _explain_import(error)
    if isinstance(error, OSError):
        remedy = _OS_REMEDIES.get(error.errno or 0, "check the path and the disk")
        target = f"to use {error.filename}" if error.filename else "input and output to work"
        return f"[files] expected {target} but got {error.strerror or error}; {remedy}", FAILED
    if isinstance(error, MemoryError):
        return "[memory] expected enough memory but got none left; close programs or take a larger machine", FAILED
    what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"[internal] expected no such failure but got {what}; report what it says with --debug", FAILED


def _explain_usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "titans-export"
    got = error.format_message().rstrip(".")
    got = got[:1].lower() + got[1:]
    return f"[usage] expected what {command} takes but got {got}; see {command} --help"


def _explain_import(error: ImportError) -> tuple[str, int]:
    """A missing package is the machine's fault; a name that is missing inside a package we need as well."""
    if str(error).startswith("[titans_runtime]"):  # says it all itself
        return str(error), MACHINE
    package = (error.name or "").partition(".")[0] or "a package"
    if package == "titans_export":
        return f"[internal] expected its own modules but got {error}; install titans-export again", FAILED
    pip = package.replace("_", "-")
    return f"[packages] expected the Python package {package} but got {error}; pip install {pip}", MACHINE


def close_stdout() -> None:
    """After the reader of a pipe has gone: nothing more can be said there, also not at the interpreter's exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
