"""`titans-export build`: an engine for a device, into a bundle."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .command import Command, emit, json_option, note
from .options import PATH
from .table import size, table

if TYPE_CHECKING:
    from ..engines.plan import Plan, Shape

_COMPILERS = ("tensorrt", "tensorrt_rtx", "onnxruntime")


@click.command(
    cls=Command,
    examples=(
        "titans-export build mac.titans --target rtx-40 --precision fp16",
        "titans-export build mac.titans --target orin-agx --dry-run",
        "titans-export build mac.titans --target orin-agx --precision fp16 --emit-trtexec -o orin/",
        "titans-export build --list-targets",
    ),
)
@click.argument("bundle", type=PATH, required=False)
@click.option("--target", metavar="NAME", help="Device to build for; see --list-targets.")
@click.option(
    "--precision",
    type=click.Choice(("fp32", "fp16", "bf16")),
    help="Of matrix products.  [default: what the weights are stored in, else fp32]",
)
@click.option("-o", "--output", type=PATH, help="Bundle to write.  [default: the engine goes into BUNDLE]")
@click.option("--name", help="Name of the engine.  [default: target and precision]")
@click.option("--graph", "graphs", multiple=True, metavar="NAME", help="Only these graphs.  [default: all]")
@click.option("--compiler", type=click.Choice(_COMPILERS), help="What compiles.  [default: the target's first]")
@click.option(
    "--alias",
    type=click.Choice(("declared", "undeclared", "two-buffers")),
    help="How TensorRT gets the memory in one buffer.  [default: undeclared]",
)
@click.option(
    "--workspace-limit",
    type=click.IntRange(1),
    metavar="MIB",
    help="Scratch memory of a kernel at most.  [default: a quarter of the target's memory, 4096 at most]",
)
@click.option("--timing-cache", type=PATH, metavar="FILE", help="Timings that TensorRT reads and adds to.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="INPUT=MIN:OPT:MAX",
    help="Shapes of an input of open shape, such as tokens=1x1:4x1:8x1.",
)
@click.option("--plugin-library", type=PATH, metavar="PATH", help="Our plugin for TensorRT.  [default: the installed]")
@click.option("--embed-plugin", is_flag=True, help="Put the plugin's library into the engine too.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, where, and what it takes; build nothing.")
@click.option("--emit-trtexec", is_flag=True, help="Print it as lines of trtexec; with -o DIR write what they need.")
@click.option("--list-targets", is_flag=True, help="List the targets.")
@click.option("--overwrite", is_flag=True, help="Replace an engine of this name, or an existing OUTPUT.")
@json_option
def build(
    bundle: Path | None,
    target: str | None,
    output: Path | None,
    dry_run: bool,
    emit_trtexec: bool,
    list_targets: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an engine for a device.

    Of BUNDLE: its graphs, compiled for one kind of device, as one engine beside those that it has. The bundle takes its
    new form only when all of it is whole. Full TensorRT builds on the device it builds for; TensorRT-RTX and ONNX
    Runtime do without it.
    """
    if list_targets:
        _list(as_json)
        return
    if bundle is None or target is None:
        missing = "BUNDLE" if bundle is None else "--target"
        raise UsageError("build", "a bundle and a target", f"no {missing}", "give it, or see --list-targets")
    if dry_run and emit_trtexec:
        raise UsageError("build", "--dry-run or --emit-trtexec", "both", "give one")
    from ..bundle import read_bundle
    from ..engines.build import build_engine
    from ..engines.plan import Request, make_plan

    options["profiles"] = dict(_profile(text) for text in options["profiles"])
    request = Request(target=target, **options)
    if dry_run:
        _show_plan(make_plan(read_bundle(bundle), request), as_json)
        return
    if emit_trtexec:
        _emit_trtexec(make_plan(read_bundle(bundle), request), output, overwrite, as_json)
        return
    report = build_engine(
        bundle,
        request,
        output=output,
        overwrite=overwrite,
        progress=note,
        step=_step if sys.stderr.isatty() else _quiet,
    )
    for text in report.notes:
        note(text)
    if as_json:
        emit(dataclasses.asdict(report))
        return
    rows = [
        (g["graph"], g["file"], size(g["bytes"]), sum(g["layers"].values()), g["seconds"]) for g in report.graphs
    ]  # fmt: skip
    if "weights" in report.engine:
        own = report.engine["weights"]["file"]
        rows.append(("weights of all", own, size((Path(report.bundle) / own).stat().st_size), "", ""))
    click.echo(
        f"{report.bundle}: engine {report.engine['name']}, {report.engine['compiler']} "
        f"{report.engine['compiler_version']}, {report.seconds} s\n"
        + table(("graph", "file", "size", "layers", "seconds"), rows)
    )


def _list(as_json: bool) -> None:
    from ..engines.targets import TARGETS

    if as_json:
        emit({"targets": [dataclasses.asdict(target) for target in TARGETS.values()]})
        return
    rows = [
        (t.name, t.device, t.sm or "-", f"{t.memory_gib} GiB" if t.gpu else "-", t.platform, ", ".join(t.compilers),
         ", ".join(t.precisions), t.system)
        for t in TARGETS.values()
    ]  # fmt: skip
    click.echo(table(("target", "device", "sm", "memory", "platform", "compilers", "precisions", "system, from"), rows))


def _show_plan(plan: Plan, as_json: bool) -> None:
    from ..engines.build import refusal
    from ..engines.plan import check_memory, where
    from ..errors import MachineError

    problem = refusal(plan)
    try:
        memory = check_memory(plan)
    except MachineError as error:
        memory = str(error)
    files = {graph.name: plan.file(graph.name) for graph in plan.graphs}
    if as_json:
        emit({
            "engine": plan.name, "target": plan.target.name, "sm": plan.target.sm, "compiler": plan.compiler,
            "precision": plan.precision, "files": files, "alias": plan.alias, "state_in_place": plan.in_place,
            "workspace": plan.workspace if plan.target.gpu else 0, "estimate": dataclasses.asdict(plan.estimate),
            "where": where(plan), "refusal": problem, "memory": memory,
        })  # fmt: skip
        return
    estimated = dataclasses.asdict(plan.estimate)
    lines = [
        f"engine {plan.name}: {plan.compiler} for {plan.target.device}"
        + (f" (sm_{plan.target.sm})" if plan.target.gpu else "")
        + f", {plan.precision}",
        f"files: {', '.join(files.values())}",
        f"built {where(plan)}",
        f"here: {problem or 'yes'}",
        "memory, estimated: " + ", ".join(f"{name} {size(count)}" for name, count in estimated.items()),
    ]
    if plan.alias:
        lines.append(f"memory in place ({plan.alias}): {', '.join(plan.in_place) or 'none'}")
    if memory:
        lines.append(memory)
    click.echo("\n".join(lines))


def _emit_trtexec(plan: Plan, output: Path | None, overwrite: bool, as_json: bool) -> None:
    from ..engines import trtexec

    lines = trtexec.lines(plan)
    written = trtexec.write_folder(plan, output, overwrite) if output else []
    if as_json:
        emit({"engine": plan.name, "lines": lines, "files": [str(path) for path in written]})
        return
    if not output:
        note("the graphs that these lines take are written with -o DIR")
    click.echo("\n".join(lines))


def _profile(text: str) -> tuple[str, tuple[Shape, Shape, Shape]]:
    """`tokens=1x1:4x1:8x1`."""
    name, _, shapes = text.rpartition("=")
    try:
        least, best, most = (tuple(int(part) for part in shape.split("x")) for shape in shapes.split(":"))
    except ValueError:
        raise UsageError("build", "--profile INPUT=MIN:OPT:MAX", repr(text), "give tokens=1x1:4x1:8x1") from None
    if not name or min(*least, *best, *most) < 1:
        raise UsageError("build", "--profile with an input's name and sizes of at least 1", repr(text), "give them")
    return name, (least, best, most)


def _step(text: str) -> None:
    """What the builder is at, on one line of the terminal."""
    sys.stderr.write(f"\r\x1b[K{text[:100]}\r")
    sys.stderr.flush()


def _quiet(text: str) -> None:
    pass
