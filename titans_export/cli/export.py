"""`titans-export export`: converts a checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..files import check_output
from ..manifest import MANIFEST
from .choices import FORMAT
from .command import Command, emit, json_option, note, say
from .kinds import check_checkpoint
from .options import PATH, config_option, weights_option
from .progress import progress_bar
from .table import number, size


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `export`."""

    checkpoint: Path
    output: Path
    format: str
    config: str | None
    weights: str | None
    library_defaults: bool
    bug_compatible: int | None
    chunks_per_call: int
    positions: int | None
    accept_unstable: bool
    overwrite: bool
    as_json: bool


@click.command(
    cls=Command,
    examples=(
        "titans-export export checkpoints/mac -o mac.titans",
        "titans-export export checkpoints/mac -o mac.titans --overwrite --json",
        "titans-export export model.pt --format titans-pytorch --config model.json -o model.titans",
        "titans-export export model.pt --format titans-pytorch --config train_mac -o model.titans",
        "titans-export export last.ckpt --weights ema --config config.json -o model.titans",
    ),
)
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="NAME.titans", help="Bundle to write.")
@click.option(
    "--format",
    type=FORMAT,
    default="titans",
    help="Format of the checkpoint: titans, titans-pytorch or titans-pytorch-mlx.",
    show_default=True,
)
@config_option
@click.option(
    "--library-defaults",
    is_flag=True,
    help="titans-pytorch: use its defaults for arguments that neither tensors nor --config determine.",
)
@weights_option
@click.option(
    "--bug-compatible",
    type=click.IntRange(1),
    metavar="PROMPT",
    help="titans-pytorch: reproduce its cached decoding after a prompt of this many tokens, bugs included.",
)
@click.option(
    "--chunks-per-call",
    type=click.IntRange(1, 64),
    default=4,
    help="Chunks per call of the prefill graph. More is faster on long texts and makes larger graphs.",
)
@click.option(
    "--positions",
    type=click.IntRange(1),
    help="Length of the golden stream in the bundle.  [default: 1024, or two chunks and segments if those are longer]",
)
@click.option(
    "--accept-unstable",
    is_flag=True,
    help="Export also a model that amplifies rounding so much that float32 does not follow two memory updates.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle once the new one is complete and checked.")
@json_option
def export(**values: Any) -> None:
    """Convert a checkpoint to a bundle.

    CHECKPOINT is what a trainer saved: a file, an index of shards, a folder, or hf://ORGANISATION/NAME. Its
    configuration is config.json beside it, or --config. The bundle runs without PyTorch. It is compared with PyTorch
    before it is renamed into place: if they differ, the exit code is 3 and nothing is written.
    """
    _export(ExportOptions(**values))


def _export(options: ExportOptions) -> None:
    check_checkpoint(options.checkpoint)
    check_output(options.output, options.overwrite, MANIFEST, source=options.checkpoint)  # before PyTorch is imported
    from ..exporting import export_checkpoint
    from ..output_limits import describe

    report = export_checkpoint(
        options.checkpoint,
        options.output,
        format=options.format,
        config=options.config,
        weights=options.weights,
        library_defaults=options.library_defaults,
        bug_compatible=options.bug_compatible,
        chunks_per_call=options.chunks_per_call,
        positions=options.positions,
        accept_unstable=options.accept_unstable,
        overwrite=options.overwrite,
        progress=note,
        bar=progress_bar,
    )
    if options.as_json:
        fields = dataclasses.asdict(report)
        fields["stability"] = report.stability.to_json() if report.stability else None
        emit({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})
        return
    say(
        f"{report.bundle}: {report.variant}, {report.parameters:,} parameters, weights {size(report.weights_bytes)}, "
        f"state {size(report.state_bytes)} per stream\n"
        f"maximum difference from PyTorch over {report.positions} tokens: {number(report.max_abs_error)} "
        f"(tolerance {number(report.tolerance)}, PyTorch float32 to float64 {number(report.pytorch_float32_error)})"
    )
    if report.stability is not None:
        say(describe(report.stability))
    if report.library_error is not None:
        say(f"maximum difference of PyTorch from the original library: {number(report.library_error)}")
