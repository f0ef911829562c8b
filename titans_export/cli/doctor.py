"""`titans-export doctor`: what this machine can do, and what it lacks."""

from __future__ import annotations

import dataclasses

import click

from ..errors import MachineError
from .command import Command, emit, json_option
from .table import table


@click.command(cls=Command, examples=("titans-export doctor", "titans-export doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has and what it lacks.

    For everything that exporting and running need: its version, what it is needed for, and how to get it. Exit code 0
    if exporting and running on the CPU work here, 4 if not; nothing else that is missing changes it.
    """
    from ..doctor import EXPORT, RUN, examine, works

    findings = examine()
    can = {purpose: works(findings, purpose) for purpose in (EXPORT, RUN)}
    if as_json:
        checks = [{**dataclasses.asdict(finding), "found": finding.found} for finding in findings]
        emit({"export": can[EXPORT], "run": can[RUN], "checks": checks})
    else:
        rows = [(f.name, f.version or "missing", f.needed_for, f.detail if f.found else f.remedy) for f in findings]
        click.echo(table(("what", "version", "needed for", "where, or how to get it"), rows))
        click.echo("\n" + "\n".join(f"{purpose}: {'works' if ok else 'does not work'}" for purpose, ok in can.items()))
    if not all(can.values()):
        lacking = next(f for f in findings if f.required_for and not f.found)
        got = lacking.detail or "none"
        raise MachineError("doctor", f"{lacking.name} for {lacking.needed_for}", got, lacking.remedy)
