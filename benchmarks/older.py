"""Prepares an older commit of this repository, so that its runtime can be measured beside the current one.

python -m benchmarks.older 123c1ac            into build/older/123c1ac, with an environment of its own
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.report import ROOT
from titans_export.errors import MachineError


class Older(NamedTuple):
    """A prepared commit."""

    commit: str
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ".venv" / "bin" / "python"

    def export(self, checkpoint: Path, bundle: Path, options: tuple[str, ...]) -> None:
        """Exports the checkpoint by the older commit, unless the bundle exists."""
        if (bundle / "manifest.json").is_file():
            return
        bundle.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), "-m", "titans_export.cli", "export", str(checkpoint), "-o", str(bundle), *options]
        _run(command, self.folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " ".join((done.stderr or done.stdout).split())[-300:]
        problem = f"`{' '.join(command[:4])}` failed in {folder.name}: {tail}"
        raise MachineError("E0908", "older", problem, "run it in that folder by hand")


def prepare(commit: str) -> Older:
    """A clone of the commit below build/older with its environment made, as its own `make setup` does."""
    done = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MachineError("E0908", "older", f"no commit {commit}", "fetch the repository's whole history")
    full = done.stdout.strip()
    folder = ROOT / "build" / "older" / full[:7]
    if not folder.is_dir():
        _run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(folder)], ROOT)
        _run(["git", "checkout", "--quiet", "--detach", full], folder)
    _run(["make", "setup"], folder)
    return Older(full, folder)


@click.command(help=__doc__)
@click.argument("commit")
def main(commit: str) -> None:
    click.echo(prepare(commit).folder)


if __name__ == "__main__":
    main()
