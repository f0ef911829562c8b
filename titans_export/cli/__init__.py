"""The command line, `titans-export`: one file per command."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .build import build
from .command import CONTEXT, NAME, Program
from .compare import compare
from .diff import diff
from .doctor import doctor
from .export import export
from .guard import guard
from .inspect import inspect
from .ops import ops
from .quantize import quantize
from .run import run
from .serve import serve
from .settings import file_option
from .streams import streams
from .verify import verify

_EPILOG = """\
Typical use:
  titans-export export checkpoints/mac -o mac.titans     convert a checkpoint to a bundle
  titans-export verify mac.titans                        check the bundle against PyTorch's outputs
  titans-export run mac.titans --prompt "To be"          run it; the memory learns as it reads

Exit codes:
  0  success
  1  failure: damaged input, input/output error
  2  wrong usage
  3  a comparison did not hold
  4  not possible on this machine or with this version; see titans-export doctor

Any option can be a variable, such as TITANS_RUN_DEVICE=cuda for run --device. Options given override variables,
and these override the file of --options.

Shell completion for bash, in ~/.bashrc (use zsh_source or fish_source for other shells):
  eval "$(_TITANS_EXPORT_COMPLETE=bash_source titans-export)"
"""


@click.group(NAME, cls=Program, context_settings=CONTEXT, epilog=_EPILOG, invoke_without_command=True)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Export Titans models, whose memory learns at inference, and run them on devices."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main.params.append(file_option())
COMMANDS = (
    export, quantize, build, guard, run, serve, streams, verify, compare, bench, inspect, diff, ops, doctor,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
