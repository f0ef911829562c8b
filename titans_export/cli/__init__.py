"""The command line, `titans-export`: one file per command."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .build import build
from .command import CONTEXT, NAME, Program
from .diff import diff
from .doctor import doctor
from .export import export
from .inspect import inspect
from .quantize import quantize
from .run import run
from .verify import verify

_EPILOG = """\
The usual path:
  titans-export export checkpoints/mac -o mac.titans     checkpoint to bundle
  titans-export verify mac.titans                        the bundle computes what PyTorch computed
  titans-export run mac.titans --prompt "To be"          run it, learning as it reads

Exit codes:
  0  done
  1  failed: damaged input, input/output error
  2  usage
  3  a comparison did not hold
  4  this machine cannot: missing library, wrong version; see titans-export doctor

Shell completion, for bash (zsh_source and fish_source for the others), in ~/.bashrc:
  eval "$(_TITANS_EXPORT_COMPLETE=bash_source titans-export)"
"""


@click.group(NAME, cls=Program, context_settings=CONTEXT, epilog=_EPILOG, invoke_without_command=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Take trained Titans models, whose memory keeps learning while they run, to devices."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (export, quantize, build, run, verify, bench, inspect, diff, doctor):
    main.add_command(command)
