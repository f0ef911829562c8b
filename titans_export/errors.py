"""Errors a user can act on, each with a stable code of docs/errors.md and an exit code."""

from __future__ import annotations

import errno

from .names import shown

_OS_FIXES = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EACCES: "check the permissions or choose another place",
    errno.EPERM: "check the permissions or choose another place",
    errno.EROFS: "choose a place you may write to",
    errno.ENOENT: "check the path, and create the folder first",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "check the path",
}


def error_line(code: str, where: str, problem: str, fix: str) -> str:
    """`[where] problem. Fix: fix (code)` on one line. White space becomes one space, a hidden character an escape."""
    return shown(" ".join(f"[{where}] {problem}. Fix: {fix} (TITANS-{code})".split()))


def os_error_fix(error: OSError) -> str:
    """What the user can do about a file that cannot be read or written."""
    return _OS_FIXES.get(error.errno or 0, "check the path and the disk")


class TitansError(Exception):
    """An error that the user can fix.

    `code` is the full code, with `TITANS-`. `where` names the part or the input. `exit_code` is the command line's.
    """

    exit_code = 1

    def __init__(self, code: str, where: str, problem: str, fix: str) -> None:
        """`code` is E and four digits. `problem` and `fix` have no period at the end; `fix` is imperative."""
        self.code, self.where, self.problem = f"TITANS-{code}", where, problem
        super().__init__(error_line(code, where, problem, fix))


class CheckpointError(TitansError, ValueError):
    """A damaged checkpoint, or one that contradicts its configuration."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A checkpoint that does not exist, or that lacks a file."""


class BundleError(TitansError, ValueError):
    """A damaged bundle, or a path that is not a bundle."""


class MissingBundleError(BundleError, FileNotFoundError):
    """A bundle that does not exist."""


class NewerBundleError(BundleError):
    """A bundle of a newer schema than this version reads."""

    exit_code = 4


class OlderBundleError(BundleError):
    """A bundle of a schema that this version no longer reads."""

    exit_code = 4


class StateError(TitansError, ValueError):
    """A state file that is damaged, of another model, or unfit for the command, or another kind of file."""


class OutputError(TitansError):
    """Output that cannot be written."""


class UsageError(TitansError, ValueError):
    """Options that contradict each other or their input."""

    exit_code = 2


class MismatchError(TitansError):
    """A comparison that did not hold."""

    exit_code = 3


class MachineError(TitansError):
    """This machine lacks what the command needs."""

    exit_code = 4
