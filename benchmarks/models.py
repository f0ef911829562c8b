"""Benchmarks whole models: runs `titans-export bench` on the example checkpoints and writes a result file for each.

python -m benchmarks.models                         all of them
python -m benchmarks.models --model recall --rounds 5
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.report import RESULTS, ROOT, provenance, write

CHECKPOINTS = Path("examples", "checkpoints")
MODELS = ("mac-bytes", "recall")


def export(model: str) -> Path:
    """The model's bundle in build/bench, exported with the defaults of the command line. The path is relative to the
    root.
    """
    bundle = Path("build", "bench", f"{model}.titans")
    (ROOT / bundle).parent.mkdir(parents=True, exist_ok=True)
    run("export", CHECKPOINTS / model, "-o", bundle, "--overwrite")
    return bundle


def run(*arguments: object, **options: object) -> str:
    """The command's output. Exits with the command's exit code if it fails."""
    command = [sys.executable, "-m", "titans_export.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        click.echo(done.stdout)
        sys.exit(done.returncode)
    return done.stdout


@click.command(help=__doc__)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(MODELS),
    help="Run only this model; repeatable.  [default: all]",
)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads per baseline.  [default: all cores]")
@click.option("--output-folder", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=False)
def main(models: tuple[str, ...], rounds: int, threads: int, output_folder: Path) -> None:
    for model in models or MODELS:
        bundle = export(model)
        source = provenance()
        options = ("--rounds", rounds, "--threads", threads)
        printed = run("bench", bundle, "--against", CHECKPOINTS / model, *options, "--json")
        result = {"benchmark": "model", "name": model, **json.loads(printed), **source}
        write(output_folder / f"cpu-{model}-{source['date']}.json", result)
        for kind, others in result["ratios"].items():
            ratios = ", ".join(f"{value:.2f} times {name}" for name, value in others.items())
            click.echo(f"{model}, {kind}: memory-kernel is {ratios}")


if __name__ == "__main__":
    main()
