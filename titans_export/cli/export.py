"""`titans-export export`: checkpoint to bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from .command import Command, emit, json_option, note
from .options import PATH, config_option
from .table import number, size


@click.command(
    cls=Command,
    examples=(
        "titans-export export checkpoints/mac -o mac.titans",
        "titans-export export checkpoints/mac -o mac.titans --overwrite --json",
        "titans-export export model.pt --format titans-pytorch --config model.json -o model.titans",
        "titans-export export model.pt --format titans-pytorch --config train_mac -o model.titans",
    ),
)
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="NAME.titans", help="Bundle to write.")
@click.option(
    "--format",
    default="titans",
    help="Format of the checkpoint: titans, titans-pytorch or titans-pytorch-mlx.",
    show_default=True,
)
@config_option
@click.option(
    "--bug-compatible",
    type=click.IntRange(1),
    metavar="PROMPT",
    help="titans-pytorch: compute what its cached decoding gives after a prompt of so many tokens, bugs included.",
)
@click.option(
    "--chunks-per-call",
    type=click.IntRange(1, 64),
    default=4,
    help="Chunks that one call of the prefill graph takes; more is faster on long texts and makes larger graphs.",
)
@click.option("--positions", type=click.IntRange(1), default=1024, help="Length of the golden stream in the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is whole and checked.")
@json_option
def export(
    checkpoint: Path,
    output: Path,
    format: str,
    config: str | None,
    bug_compatible: int | None,
    chunks_per_call: int,
    positions: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a bundle.

    CHECKPOINT is a folder with config.json and model.safetensors, or with --format titans-pytorch a state dict in .pt
    or .safetensors and --config beside it; the bundle runs without PyTorch. Before it takes its
    name it is run and compared with PyTorch: if they differ, the exit code is 3 and nothing is written.
    """
    from ..exporting import export_checkpoint

    report = export_checkpoint(
        checkpoint,
        output,
        format=format,
        config=config,
        bug_compatible=bug_compatible,
        chunks_per_call=chunks_per_call,
        positions=positions,
        overwrite=overwrite,
        progress=note,
    )
    if as_json:
        fields = dataclasses.asdict(report)
        emit({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})
        return
    click.echo(
        f"{report.bundle}: {report.variant}, {report.parameters:,} parameters, weights {size(report.weights_bytes)}, "
        f"state {size(report.state_bytes)} a stream\n"
        f"largest difference to PyTorch over {report.positions} tokens: {number(report.max_abs_error)} "
        f"(tolerance {number(report.tolerance)}, PyTorch float32 itself {number(report.pytorch_float32_error)})"
    )
    if report.library_error is not None:
        click.echo(f"largest difference of PyTorch to the library that trained it: {number(report.library_error)}")
