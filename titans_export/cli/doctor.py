"""`titans-export doctor`: checks the installation."""

from __future__ import annotations

import dataclasses

import click

from ..errors import MachineError
from .command import Command, emit, json_option, say
from .table import table


@click.command(cls=Command, examples=("titans-export doctor", "titans-export doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation.

    Lists the version, purpose and location of every dependency, and how to install a missing one. Exit code 0 if
    exporting and running on the CPU work, 4 otherwise; optional dependencies do not change it.
    """
    from ..doctor import EXPORT, RUN, examine, works

    findings = examine()
    can = {purpose: works(findings, purpose) for purpose in (EXPORT, RUN)}
    if as_json:
        checks = [{**dataclasses.asdict(finding), "found": finding.found} for finding in findings]
        emit({"export": can[EXPORT], "run": can[RUN], "checks": checks})
    else:
        rows = [(f.name, f.version or "missing", f.needed_for, f.detail if f.found else f.fix) for f in findings]
        say(table(("component", "version", "needed for", "location, or how to install it"), rows))
        say("\n" + "\n".join(f"{purpose}: {'works' if ok else 'does not work'}" for purpose, ok in can.items()))
    if not all(can.values()):
        lacking = next(f for f in findings if f.required_for and not f.found)
        detail = f": {lacking.detail}" if lacking.detail else ""
        problem = f"{lacking.name} is missing or does not work, needed for {lacking.needed_for}{detail}"
        raise MachineError("E1006", "doctor", problem, lacking.fix)
