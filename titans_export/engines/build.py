"""Builds engines into a bundle: compiles every graph, then replaces the bundle atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle, file_record, read_bundle
from ..errors import BundleError, MachineError
from ..files import check_file, check_output, replacing_file, replacing_folder
from ..manifest import EngineEntry, EngineGraph, FileReference, GraphEntry, Plugin
from ..onnx.files import load_structure
from ..onnx.mapped import load_mapped, spilling, write_graph
from ..onnx.weights import share_weights
from . import graphs, tensorrt, tensorrt_rtx
from .machine import Machine, this_machine
from .messages import Progress
from .plan import Plan, Request, check_machine, check_memory, check_name, make_plan
from .precision import lower_precision
from .quantised import weights_format
from .targets import ORT, RTX, TENSORRT
from .vendor import Settings, build_plan


@dataclass(frozen=True)
class Report:
    """The result of a build."""

    bundle: str
    engine: dict[str, Any]  # the manifest's entry, as JSON
    graphs: list[dict[str, Any]]  # graph, file, bytes, layers, engine_layers, warnings, seconds
    estimate: dict[str, int]
    workspace: int
    notes: list[str]
    seconds: float


def build_engine(
    path: Path,
    request: Request,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda text: None,
    step: Progress = lambda text: None,
    vendor: Any = None,
) -> Report:
    """Builds an engine of the bundle at `path` into it, or into a copy of it at `output`.

    `vendor` stands in for the vendor's module. Raises TitansError; then nothing is written.
    """
    began = time.monotonic()
    bundle = read_bundle(path)
    plan = make_plan(bundle, request)
    check_name(plan, overwrite)
    needs = sum(file.bytes for file in bundle.manifest.files.values())  # the files are copied
    same = output is None or output.resolve() == path.resolve()
    check_output(output or path, same or overwrite, MANIFEST, source=path, needs=needs)
    check_file(request.timing_cache)
    notes = [note] if (note := check_memory(plan)) else []
    if request.embed_plugin:
        notes.append("titans_runtime runs no code from an engine's file: this one is for other programs")
    machine = this_machine()
    check_machine(plan, machine)
    vendor = vendor or _find(plan)
    target = (output or path).resolve()
    reports: list[dict[str, Any]] = []
    # Beside the bundle, so that the result can be moved instead of copied.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.build.", dir=target.parent) as name:
        work = Path(name)
        for number, graph in enumerate(plan.graphs, start=1):
            progress(f"building {plan.name} of {graph.name}, graph {number} of {len(plan.graphs)}")
            started = time.monotonic()
            file = work / plan.file(graph.name)
            known = _COMPILERS[plan.compiler](plan, graph, vendor, machine, work, file, step)
            seconds = round(time.monotonic() - started, 2)
            reports.append({"graph": graph.name, "file": file.name, "bytes": file.stat().st_size, **known})
            reports[-1]["seconds"] = seconds
        engine = _entry(plan, vendor, machine)
        if plan.compiler == ORT and not plan.target.gpu:
            engine = _share_weights(plan, engine, work)
            for report in reports:
                report["bytes"] = (work / report["file"]).stat().st_size
        _write(bundle, target, engine, work, overwrite)
    return Report(
        bundle=str(output or path),
        engine=engine.to_json(),
        graphs=reports,
        estimate=asdict(plan.estimate),
        workspace=plan.workspace if plan.target.gpu else 0,
        notes=notes,
        seconds=round(time.monotonic() - began, 1),
    )


def _find(plan: Plan) -> Any:
    """The vendor's module in a release that supports the target. Raises MachineError."""
    if plan.compiler == TENSORRT:
        vendor = tensorrt.find()
        tensorrt.check(vendor, plan.target)
        return vendor
    if plan.compiler == RTX:
        return tensorrt_rtx.find()
    import onnxruntime

    return onnxruntime


def _tensorrt(
    plan: Plan, graph: GraphEntry, vendor: Any, machine: Machine, work: Path, file: Path, step: Progress
) -> dict[str, Any]:
    """Compiles a graph to `file`. Returns its entry of the report."""
    request, cache = plan.request, None
    if request.timing_cache is not None:
        cache = request.timing_cache.read_bytes() if request.timing_cache.exists() else b""
    settings = Settings(workspace=plan.workspace, timing_cache=cache, profiles=request.profiles)
    if plan.compiler == TENSORRT:
        if plan.plugin:
            settings.plugin_library = tensorrt.plugin_library(
                request.plugin_library, tensorrt.release(vendor.__version__)[0]
            )
            settings.embed_plugin = request.embed_plugin
            settings.aliased = plan.alias == graphs.DECLARED
        settings.open_here = True
    else:
        settings.capabilities = [plan.target.sm or 0]
        settings.open_here = machine.find(plan.target.sm or 0) is not None
    with spilling(work) as spill:
        source = write_graph(plan.prepare(graph, spill), work / "graph.onnx")
    built = build_plan(vendor, source, settings, step)
    file.write_bytes(built.plan)
    if request.timing_cache is not None and built.timing_cache is not None:
        with replacing_file(request.timing_cache) as aside:
            aside.write_bytes(built.timing_cache)
    return {"layers": built.layers, "engine_layers": built.engine_layers, "warnings": built.warnings}


def _onnxruntime(
    plan: Plan, graph: GraphEntry, vendor: Any, machine: Machine, work: Path, file: Path, step: Progress
) -> dict[str, Any]:
    from . import onnxruntime as ort

    source = plan.source(graph)
    if plan.target.gpu:
        lowered = lower_precision(load_mapped(source), plan.precision, memory=False)
        model = ort.point_back(graphs.with_kernels(lowered), source)
    else:
        model = ort.optimise(source, work, weights_format(plan.bundle.quantization))
    file.write_bytes(model.SerializeToString(deterministic=True))
    layers: dict[str, int] = {}
    for node in model.graph.node:
        layers[node.op_type] = layers.get(node.op_type, 0) + 1
    return {"layers": layers, "engine_layers": None, "warnings": []}


def _share_weights(plan: Plan, engine: EngineEntry, work: Path) -> EngineEntry:
    """Moves the graphs' weights into one file of the engine, and lists the weights that the runtime hands over."""
    models = {own.graph: load_structure(work / own.file) for own in engine.graphs}
    path = work / f"{plan.name}.safetensors"
    names = share_weights(models, path, named=None)
    for own in engine.graphs:
        (work / own.file).write_bytes(models[own.graph].SerializeToString(deterministic=True))
    graphs = tuple(replace(own, weights=tuple(names[own.graph])) for own in engine.graphs)
    shared = {name for graph in plan.bundle.manifest.graphs for name in graph.weights}
    new = set().union(*names.values()) - shared
    return replace(engine, graphs=graphs, weights=FileReference(file=path.name) if new else None)


_COMPILERS: dict[str, Callable[..., dict[str, Any]]] = {
    TENSORRT: _tensorrt,
    RTX: _tensorrt,
    ORT: _onnxruntime,
}


def _entry(plan: Plan, vendor: Any, machine: Machine) -> EngineEntry:
    """The engine's entry of the manifest."""
    target, cuda, driver = plan.target, None, None
    if plan.compiler == TENSORRT:
        driver = machine.driver  # the driver of the build; older drivers are untested
    elif plan.compiler == RTX:
        driver = tensorrt_rtx.cuda_major() * 1000
    if driver is not None:
        cuda = f"{driver // 1000}.{driver % 1000 // 10}"
    return EngineEntry(
        name=plan.name,
        target=target.name,
        compiler=plan.compiler,
        compiler_version=vendor.__version__,
        precision=plan.precision,
        device="cuda" if target.gpu else "cpu",
        sm=(target.sm,) if target.sm is not None else (),
        platform=target.platform if target.gpu else machine.platform,
        cuda=cuda,
        driver=driver,
        memory=_memory(plan),
        plugin=Plugin.from_json(graphs.PLUGIN) if plan.plugin else None,
        alias=plan.alias,
        state_in_place=tuple(plan.in_place),
        graphs=tuple(EngineGraph(graph=graph.name, file=plan.file(graph.name)) for graph in plan.graphs),
    )


def _memory(plan: Plan) -> str:
    """The kind of code that computes the memory, as named in the manifest."""
    if plan.compiler == ORT:
        return "either" if plan.bundle.manifest.memory.dtype == "float32" else "kernel"
    return "plugin" if plan.plugin else "standard-operators"


def _write(before: Bundle, target: Path, engine: EngineEntry, work: Path, overwrite: bool) -> None:
    """Replaces the bundle by one with the engine. Keeps other changes made since the start of the build."""
    bundle = read_bundle(before.path)
    same = target == before.path.resolve()
    changed = [
        graph.file
        for graph in before.manifest.graphs
        if bundle.manifest.files.get(graph.file) != before.manifest.files[graph.file]
    ]
    if changed:
        raise BundleError("E0663", "build", f"{changed[0]} changed during the build", "build the engine again")
    files = {name: file_record(work / name) for name in engine.files}
    manifest, dropped = bundle.manifest.with_engine(engine, files)
    with replacing_folder(target, overwrite=same or overwrite, marker=MANIFEST) as aside:
        for path in bundle.path.iterdir():
            if path.name not in dropped and path.name != MANIFEST:
                _take(path, aside / path.name)
        for name in files:
            os.replace(work / name, aside / name)
        manifest.write(aside)


def _take(path: Path, to: Path) -> None:
    """Copies a file of the old bundle, because ONNX rejects weights in files with several hard links."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True)
    else:
        shutil.copy2(path, to, follow_symlinks=False)


def refusal(plan: Plan) -> str | None:
    """The reason why this machine cannot build the plan, or None."""
    try:
        check_machine(plan, this_machine())
        _find(plan)
    except MachineError as error:
        return str(error)
    return None
