"""The plan of a build, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnx import ModelProto

from ..bundle import Bundle
from ..dtypes import tensor_bytes
from ..errors import MachineError, UsageError
from ..manifest import NO_ENGINE, GraphEntry, StateTensor
from ..onnx.mapped import Spill, load_mapped
from ..onnx.streams import fix_streams
from ..schedule import missing
from . import estimate as memory
from . import graphs, tensorrt, tensorrt_rtx
from .machine import Machine
from .precision import lower_precision
from .quantised import check_target, choose_precision, for_compiler
from .scans import unroll_scans
from .targets import ORT, RTX, TENSORRT, Target, find_target

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIXES = {TENSORRT: "engine", RTX: "engine", ORT: "onnx"}
_SHORT = {TENSORRT: "trt", RTX: "rtx", ORT: "ort"}
TIGHT = 0.75  # share of a target's memory above which a note is given

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """The user's request. None and empty values select the default."""

    target: str
    precision: str | None = None
    compiler: str | None = None
    name: str | None = None
    graphs: Sequence[str] = ()
    alias: str | None = None
    workspace_limit: int | None = None  # MiB
    timing_cache: Path | None = None
    profiles: dict[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    plugin_library: Path | None = None
    embed_plugin: bool = False


@dataclass(frozen=True)
class Plan:
    """The engine to build."""

    request: Request
    bundle: Bundle
    target: Target
    compiler: str
    name: str
    graphs: list[GraphEntry]
    plugin: bool  # the memory's plugin runs some nodes
    alias: str | None
    in_place: list[str]
    workspace: int
    estimate: memory.Estimate

    @property
    def precision(self) -> str:
        """The precision of matmuls."""
        assert self.request.precision is not None  # set by make_plan
        return self.request.precision

    def file(self, graph: str) -> str:
        """The engine's file of a graph."""
        return f"{self.name}.{graph}.{_SUFFIXES[self.compiler]}"

    def source(self, graph: GraphEntry) -> Path:
        """The graph's own file."""
        return self.bundle.path / graph.file

    def prepare(self, graph: GraphEntry, spill: Spill | None = None) -> ModelProto:
        """The graph in a form that the compiler's parser accepts, with mapped weights.

        spill: where large new weights go; None keeps them inside.
        """
        model = load_mapped(self.source(graph))
        if self.compiler in (RTX, TENSORRT) and (slots := self.bundle.manifest.controls.slots):
            fix_streams(model, slots, 1)
        if self.compiler in (RTX, TENSORRT) and self.bundle.quantization is not None:
            model = for_compiler(model, spill)
        lowered = lower_precision(model, self.precision, self.compiler == TENSORRT, spill)
        if self.compiler == RTX:
            return unroll_scans(graphs.inline(lowered))
        if self.compiler == TENSORRT:
            inputs = [entry.input for entry in self.bundle.manifest.state if entry.name in self.in_place]
            return unroll_scans(graphs.with_plugin(lowered, self.alias or graphs.TWO_BUFFERS, inputs))
        return lowered


def make_plan(bundle: Bundle, request: Request) -> Plan:
    """Makes the plan. Raises UsageError, and MachineError for unsupported targets."""
    target = find_target(request.target)
    compiler = request.compiler or target.compilers[0]
    precision = choose_precision(bundle.quantization, target, request.precision)
    request = replace(request, precision=precision)
    _check_options(request, target, compiler)
    name = request.name or _default_name(target, precision, compiler)
    if not _NAME.fullmatch(name) or name == NO_ENGINE:
        problem = f"invalid name: expected letters, digits, '.', '_' and '-', got {name!r}"
        raise UsageError("E0104", "build", problem, "give another --name")
    chosen = _choose_graphs(bundle, request.graphs)
    state = bundle.manifest.state
    models = [load_mapped(bundle.path / graph.file) for graph in chosen]
    check_target(bundle.quantization, models, target, compiler)
    if compiler in (RTX, TENSORRT) and bundle.quantization is not None:
        models = [for_compiler(model) for model in models]
    plugin = compiler == TENSORRT and any(graphs.has_kernel(node) for model in models for node in model.graph.node)
    alias, in_place = None, []
    if compiler == TENSORRT:
        alias = request.alias or graphs.UNDECLARED
        in_place = [] if alias == graphs.TWO_BUFFERS else graphs.in_place(models, state)
        alias = alias if in_place else graphs.TWO_BUFFERS
    workspace = memory.default_workspace(target)
    if request.workspace_limit is not None:
        workspace = request.workspace_limit << 20
    # One at a time, so that only one graph's new weights are in memory.
    lowered = (lower_precision(model, precision, memory=compiler == TENSORRT) for model in models)
    estimated = memory.estimate(
        target, lowered, _state_bytes(state, in_place), workspace if target.gpu else 0, here=compiler == TENSORRT
    )
    return Plan(request, bundle, target, compiler, name, chosen, plugin, alias, in_place, workspace, estimated)


def check_memory(plan: Plan) -> str | None:
    """Returns a note if the target's memory is tight. Raises MachineError if it is too small."""
    target, estimated = plan.target, plan.estimate
    need = max(estimated.build, estimated.run)
    what = f"about {_gib(need)} to {'build' if need == estimated.build else 'run'} on {target.name}"
    if not target.gpu:
        return None
    if need > target.memory:
        problem = f"the target has too little memory: {what}, which has {target.memory_gib} GiB"
        fix = "give a smaller --workspace-limit, a lower --precision or fewer --graph"
        raise MachineError("E0656", "build", problem, fix)
    if need > TIGHT * target.memory:
        return f"{what}, which has {target.memory_gib} GiB"
    return None


def check_machine(plan: Plan, machine: Machine) -> None:
    """Raises MachineError if the compiler cannot build for the target on this machine."""
    if plan.compiler == TENSORRT:
        tensorrt.check_machine(plan.target, machine)
    elif plan.compiler == RTX:
        tensorrt_rtx.check_machine(plan.target, machine)


def where(plan: Plan) -> str:
    """The kinds of machine that can build the engine."""
    if plan.compiler == TENSORRT:
        return f"on the {plan.target.device} itself, with {plan.target.system or 'TensorRT'}"
    if plan.compiler == RTX:
        return f"on any {plan.target.platform} machine with tensorrt-rtx, GPU or not"
    return "anywhere"


def _check_options(request: Request, target: Target, compiler: str) -> None:
    if request.precision not in target.precisions:
        known = " or ".join(target.precisions)
        problem = f"unsupported --precision for {target.name}: expected {known}, got {request.precision}"
        raise UsageError("E0104", "build", problem, f"give --precision {known}")
    if compiler == RTX:
        tensorrt_rtx.check_target(target)
    if compiler not in target.compilers:
        known = " or ".join(target.compilers)
        problem = f"unsupported --compiler for {target.name}: expected {known}, got {compiler}"
        raise MachineError("E0655", "build", problem, f"give --compiler {known}")
    for option, given, served in (
        ("--alias", request.alias, (TENSORRT,)),
        ("--plugin-library", request.plugin_library, (TENSORRT,)),
        ("--embed-plugin", request.embed_plugin, (TENSORRT,)),
        ("--timing-cache", request.timing_cache, (TENSORRT,)),
        ("--profile", request.profiles, (TENSORRT, RTX)),
        ("--workspace-limit", request.workspace_limit, (TENSORRT, RTX)),
    ):
        if given and compiler not in served:
            problem = f"{option} is for --compiler {' or '.join(served)}, not {compiler}"
            raise UsageError("E0102", "build", problem, f"leave out {option}")


def _default_name(target: Target, precision: str, compiler: str) -> str:
    other = "" if compiler == target.compilers[0] else f"-{_SHORT[compiler]}"
    return f"{target.name}-{precision}{other}"


def _choose_graphs(bundle: Bundle, wanted: Sequence[str]) -> list[GraphEntry]:
    known = bundle.manifest.graphs
    names = [graph.name for graph in known]
    if unknown := [name for name in wanted if name not in names]:
        problem = f"unknown --graph: expected one of {', '.join(names)}, got {unknown[0]}"
        raise UsageError("E0104", "build", problem, "give one of these")
    chosen = [graph for graph in known if not wanted or graph.name in wanted]
    if missing(chosen):  # the bundle's graphs together form a schedule
        singles = [graph.name for graph in known if graph.tokens == 1 and graph not in chosen]
        fix = "add " + " ".join(f"--graph {name}" for name in singles)
        problem = f"{', '.join(wanted)} cannot take one token at every position"
        raise UsageError("E0102", "build", problem, fix)
    return chosen


def check_name(plan: Plan, overwrite: bool) -> None:
    """Raises UsageError if the engine or one of its files exists."""
    engines = plan.bundle.manifest.engines
    own = {graph.file for engine in engines if engine.name == plan.name for graph in engine.graphs}
    if own and not overwrite:
        problem = f"{plan.bundle.path} has an engine {plan.name}"
        raise UsageError("E1008", "build", problem, "give --overwrite to build it again, or another --name")
    taken = {path.name for path in plan.bundle.path.iterdir()} - own
    for graph in plan.graphs:
        if (file := plan.file(graph.name)) in taken:
            raise UsageError("E1008", "build", f"{plan.bundle.path} has a file {file}", "give another --name")


def _state_bytes(state: Sequence[StateTensor], in_place: Sequence[str]) -> int:
    return sum(tensor_bytes(entry.shape, entry.dtype) * (1 if entry.name in in_place else 2) for entry in state)


def _gib(count: int) -> str:
    return f"{count / memory.GIB:.1f} GiB"
