"""Errors a user can act on: `[where] expected X but got Y; do Z`, and the exit code each kind stands for."""

from __future__ import annotations


class TitansError(Exception):
    """Something a user can mend. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, where: str, expected: str, got: str, remedy: str) -> None:
        one_line = " ".join(f"[{where}] expected {expected} but got {got}; {remedy}".split())
        super().__init__(one_line)


class CheckpointError(TitansError):
    """A checkpoint that is missing, damaged or not what its configuration says."""


class BundleError(TitansError):
    """A bundle that is missing or damaged."""


class NewerBundleError(BundleError):
    """A bundle of a newer schema than this version reads."""

    exit_code = 4


class OlderBundleError(BundleError):
    """A bundle of a schema that this version no longer reads."""

    exit_code = 4


class OutputError(TitansError):
    """Output that cannot be written."""


class UsageError(TitansError):
    """Options that contradict each other or their input."""

    exit_code = 2


class MismatchError(TitansError):
    """A comparison that did not hold."""

    exit_code = 3


class MachineError(TitansError):
    """This machine lacks what the command needs."""

    exit_code = 4
