"""`titans-export build`: builds an engine for a device into a bundle."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .choices import TARGET
from .command import Command, emit, json_option, note, say
from .kinds import check_bundle
from .options import PATH
from .table import size, table

if TYPE_CHECKING:
    from ..engines.plan import Plan, Shape

_COMPILERS = ("tensorrt", "tensorrt_rtx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of `build`."""

    bundle: Path | None
    target: str | None
    precision: str | None
    output: Path | None
    name: str | None
    graphs: tuple[str, ...]
    compiler: str | None
    alias: str | None
    workspace_limit: int | None
    timing_cache: Path | None
    profiles: tuple[str, ...]
    plugin_library: Path | None
    embed_plugin: bool
    dry_run: bool
    emit_trtexec: bool
    list_targets: bool
    overwrite: bool
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export build mac.titans --target rtx-40 --precision fp16",
        "titans-export build mac.titans --target orin-agx --dry-run",
        "titans-export build mac.titans --target orin-agx --precision fp16 --emit-trtexec -o orin/",
        "titans-export build --list-targets",
    ),
)
@click.argument("bundle", type=PATH, required=False)
@click.option("--target", type=TARGET, metavar="NAME", help="Device to build for; see --list-targets.")
@click.option(
    "--precision",
    type=click.Choice(("fp32", "fp16", "bf16")),
    help="Precision of matmuls.  [default: that of the stored weights, else fp32]",
)
@click.option("-o", "--output", type=PATH, help="Bundle to write.  [default: add the engine to BUNDLE]")
@click.option("--name", help="Name of the engine.  [default: target and precision]")
@click.option("--graph", "graphs", multiple=True, metavar="NAME", help="Graph to build; repeatable.  [default: all]")
@click.option("--compiler", type=click.Choice(_COMPILERS), help="Compiler.  [default: the target's first]")
@click.option(
    "--alias",
    type=click.Choice(("declared", "undeclared", "two-buffers")),
    help="How TensorRT updates the memory in place.  [default: undeclared]",
)
@click.option(
    "--workspace-limit",
    type=click.IntRange(1),
    metavar="MIB",
    help="Maximum scratch memory per kernel.  [default: a quarter of the target's memory, at most 4096]",
)
@click.option("--timing-cache", type=PATH, metavar="FILE", help="Timing cache that TensorRT reads and extends.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="INPUT=MIN:OPT:MAX",
    help="Shapes of an input with dynamic shape, such as tokens=1x1:4x1:8x1.",
)
@click.option("--plugin-library", type=PATH, metavar="PATH", help="Our TensorRT plugin.  [default: the installed one]")
@click.option("--embed-plugin", is_flag=True, help="Embed the plugin library in the engine.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory use; build nothing.")
@click.option("--emit-trtexec", is_flag=True, help="Print trtexec commands; with -o DIR write their input files.")
@click.option("--list-targets", is_flag=True, help="List the targets.")
@click.option("--overwrite", is_flag=True, help="Replace an engine of this name, or an existing OUTPUT.")
@json_option
def build(**values: Any) -> None:
    """Build an engine for a device.

    Compiles the graphs of BUNDLE for one kind of device and adds them to the bundle as an engine. The bundle is
    replaced atomically once the engine is complete. TensorRT builds on the device itself; TensorRT-RTX and ONNX Runtime
    build on any machine.
    """
    _build(BuildOptions(**values))


def _build(options: BuildOptions) -> None:
    if options.list_targets:
        _list(options.as_json)
        return
    if options.bundle is None or options.target is None:
        missing = "BUNDLE" if options.bundle is None else "--target"
        raise UsageError("E0103", "build", f"missing {missing}", "give it, or see --list-targets")
    if options.dry_run and options.emit_trtexec:
        raise UsageError("E0102", "build", "--dry-run and --emit-trtexec exclude each other", "give one of them")
    check_bundle(options.bundle)
    from ..bundle import read_bundle
    from ..engines.build import build_engine
    from ..engines.plan import Request, make_plan

    request = Request(
        target=options.target,
        precision=options.precision,
        name=options.name,
        graphs=options.graphs,
        compiler=options.compiler,
        alias=options.alias,
        workspace_limit=options.workspace_limit,
        timing_cache=options.timing_cache,
        profiles=dict(_profile(text) for text in options.profiles),
        plugin_library=options.plugin_library,
        embed_plugin=options.embed_plugin,
    )
    if options.dry_run:
        _show_plan(make_plan(read_bundle(options.bundle), request), options.as_json)
        return
    if options.emit_trtexec:
        plan = make_plan(read_bundle(options.bundle), request)
        _emit_trtexec(plan, options.output, options.overwrite, options.as_json)
        return
    report = build_engine(
        options.bundle,
        request,
        output=options.output,
        overwrite=options.overwrite,
        progress=note,
        step=_step if sys.stderr.isatty() else _quiet,
    )
    for text in report.notes:
        note(text)
    if options.as_json:
        emit(dataclasses.asdict(report))
        return
    rows = [
        (g["graph"], g["file"], size(g["bytes"]), sum(g["layers"].values()), g["seconds"]) for g in report.graphs
    ]  # fmt: skip
    if "weights" in report.engine:
        own = report.engine["weights"]["file"]
        rows.append(("shared weights", own, size((Path(report.bundle) / own).stat().st_size), "", ""))
    say(
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
    say(table(("target", "device", "sm", "memory", "platform", "compilers", "precisions", "system, from"), rows))


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
        f"can be built here: {problem or 'yes'}",
        "estimated memory: " + ", ".join(f"{name} {size(count)}" for name, count in estimated.items()),
    ]
    if plan.alias:
        lines.append(f"updated in place ({plan.alias}): {', '.join(plan.in_place) or 'none'}")
    if memory:
        lines.append(memory)
    say("\n".join(lines))


def _emit_trtexec(plan: Plan, output: Path | None, overwrite: bool, as_json: bool) -> None:
    from ..engines import trtexec

    lines = trtexec.lines(plan)
    written = trtexec.write_folder(plan, output, overwrite) if output else []
    if as_json:
        emit({"engine": plan.name, "lines": lines, "files": [str(path) for path in written]})
        return
    if not output:
        note("-o DIR writes the graphs that these commands read")
    say("\n".join(lines))


def _profile(text: str) -> tuple[str, tuple[Shape, Shape, Shape]]:
    """`tokens=1x1:4x1:8x1`."""
    name, _, shapes = text.rpartition("=")
    try:
        least, best, most = (tuple(int(part) for part in shape.split("x")) for shape in shapes.split(":"))
    except ValueError:
        raise _bad_profile(text) from None
    if not name or min(*least, *best, *most) < 1:
        raise _bad_profile(text)
    return name, (least, best, most)


def _bad_profile(text: str) -> UsageError:
    problem = f"invalid --profile: expected INPUT=MIN:OPT:MAX with sizes of at least 1, got {text!r}"
    return UsageError("E0104", "build", problem, "give it like tokens=1x1:4x1:8x1")


def _step(text: str) -> None:
    """Shows the builder's progress on one line of the terminal."""
    sys.stderr.write(f"\r\x1b[K{text[:100]}\r")
    sys.stderr.flush()


def _quiet(text: str) -> None:
    pass
