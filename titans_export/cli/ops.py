"""`titans-export ops`: the operators that a reduced build of ONNX Runtime needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..files import check_file, replacing_file
from .command import Command, emit, json_option, say
from .kinds import check_bundle
from .options import PATH


@dataclass(frozen=True, kw_only=True)
class OpsOptions:
    """The options of `ops`."""

    bundles: tuple[Path, ...]
    output: Path | None
    standard_operators: bool
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export ops mac.titans -o required_operators.config",
        "titans-export ops mac.titans int8.titans --json",
    ),
)
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("-o", "--output", type=PATH, metavar="FILE", help="File to write.  [default: stdout]")
@click.option("--standard-operators", is_flag=True, help="For a runtime without our kernels.")
@json_option
def ops(**values: Any) -> None:
    """List the operators that a reduced build of ONNX Runtime needs for bundles.

    The list has the operators of all graphs, and those that ONNX Runtime makes of them when it optimises. Give the file
    to ONNX Runtime's build script as --include_ops_by_config. Our own operators come from our library.
    """
    _ops(OpsOptions(**values))


def _ops(options: OpsOptions) -> None:
    check_file(options.output)
    for bundle in options.bundles:
        check_bundle(bundle)
    from ..bundle import read_bundle
    from ..reduced_build import config, operators

    found: dict[tuple[str, int], set[str]] = {}
    for bundle in options.bundles:
        for key, names in operators(read_bundle(bundle), options.standard_operators).items():
            found.setdefault(key, set()).update(names)
    if options.output is not None:
        with replacing_file(options.output) as aside:
            aside.write_text(config(found), encoding="utf-8")
    if options.as_json:
        rows = [{"domain": key[0], "version": key[1], "operators": sorted(found[key])} for key in sorted(found)]
        emit({"bundles": [str(bundle) for bundle in options.bundles], "operators": rows})
    elif options.output is None:
        say(config(found).rstrip())
    else:
        say(f"{options.output}: {sum(map(len, found.values()))} operators")
