"""Build steps common to TensorRT and TensorRT-RTX. The vendor's module is a parameter.

The log is checked after every step, because some calls log a failure and still return an engine.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import TensorProto

from ..errors import MachineError, UsageError
from ..files import utf8_path
from ..onnx.files import load_structure
from .messages import BuildError, Progress, explain, interruptible, make_log, make_monitor

_DTYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
}


@dataclass
class Settings:
    """Settings of a build."""

    workspace: int | None = None  # bytes
    timing_cache: bytes | None = None  # empty: start a new one
    profiles: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = field(default_factory=dict)
    aliased: bool = False  # a plugin declares an output that shares its input's buffer
    plugin_library: Path | None = None
    embed_plugin: bool = False
    capabilities: Sequence[int] = ()  # TensorRT-RTX: the compute capabilities to build for
    open_here: bool = False  # this machine can run the engine, so it is opened once to list its layers


@dataclass
class Built:
    """An engine and its description."""

    plan: memoryview  # view of the vendor's buffer, which avoids a second copy of the engine
    layers: dict[str, int]  # layers of the network by kind
    engine_layers: list[str] | None  # from the engine's inspector; None if it cannot be opened here
    timing_cache: bytes | None
    warnings: list[str]


@contextmanager
def no_collection() -> Iterator[None]:
    """A block in which no garbage is collected.

    The vendor holds a lock while it logs. A collection in the log's callback could free an older builder there, which
    would wait for that lock for ever.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_plan(trt: Any, path: Path, settings: Settings, progress: Progress = lambda text: None) -> Built:
    """Builds the graph at `path` with the vendor's module. Raises BuildError."""
    log = make_log(trt)
    with no_collection():
        builder = trt.Builder(log)
        if settings.plugin_library:
            _load_plugin(builder.get_plugin_registry(), settings.plugin_library, log)
        network = builder.create_network(_flag(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
        parse(trt, network, path, log)
        return build_network(trt, builder, network, settings, log, progress)


def build_network(
    trt: Any, builder: Any, network: Any, settings: Settings, log: Any, progress: Progress = lambda text: None
) -> Built:
    """Builds the parsed network. Raises BuildError, including for failures that the vendor only logs."""
    config = _configure(trt, builder, network, settings, log)
    layers = Counter(network.get_layer(i).type.name.lower() for i in range(network.num_layers))
    with interruptible() as interrupted:
        monitor = make_monitor(trt, progress, interrupted)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    log.check("engine")
    if plan is None:
        raise BuildError(
            "E0658", "build", "the builder returned no engine and no reason", "report this with the bundle"
        )
    data = memoryview(plan)
    cache = config.get_timing_cache() if settings.timing_cache is not None else None
    return Built(
        plan=data,
        layers=dict(layers.most_common()),
        engine_layers=_inspect(trt, data, settings) if settings.open_here else None,
        timing_cache=bytes(cache.serialize()) if cache is not None else None,
        warnings=log.texts("WARNING"),
    )


def parse(trt: Any, network: Any, path: Path, log: Any) -> None:
    """Parses the graph into the network. Checks that inputs and outputs match the graph's."""
    parser = trt.OnnxParser(network, log)
    with utf8_path(path) as name:
        parsed = parser.parse_from_file(name)
    if not parsed or parser.num_errors:
        problem = f"the parser cannot read the graph: {explain(parser, log)}"
        raise BuildError("E0658", "parser", problem, "report this with the bundle")
    log.check("parser")
    graph = load_structure(path).graph
    for what, values, count, get in (
        ("input", graph.input, network.num_inputs, network.get_input),
        ("output", graph.output, network.num_outputs, network.get_output),
    ):
        expected = {value.name: _DTYPES.get(value.type.tensor_type.elem_type, "?") for value in values}
        got = {get(i).name: get(i).dtype.name for i in range(count)}
        if differing := sorted(set(expected.items()) ^ set(got.items())):
            problem = f"the parser changed the {what}s of the graph: {differing[0][0]} has another type or is missing"
            raise BuildError("E0658", "parser", problem, "report this with the bundle")


def _configure(trt: Any, builder: Any, network: Any, settings: Settings, log: Any) -> Any:
    config = builder.create_builder_config()
    # TensorFloat-32 keeps 10 bits of mantissa, too few for fp32 and for the memory.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.capabilities:
        _set_capabilities(trt, config, settings.capabilities)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.aliased:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if settings.plugin_library and settings.embed_plugin:
        config.plugins_to_serialize = [str(settings.plugin_library)]
    if settings.timing_cache is not None:
        cache = config.create_timing_cache(settings.timing_cache)
        if cache is None or not config.set_timing_cache(cache, False):
            problem = f"the timing cache does not fit this device and version: {log.first() or 'no reason given'}"
            raise MachineError("E0659", "timing cache", problem.rstrip("."), "give another file")
    _set_profile(builder, config, network, settings)
    log.check("configuration")
    return config


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[int]) -> None:
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(capabilities)
    for place, sm in enumerate(capabilities):
        if f"SM{sm}" not in known or not config.set_compute_capability(known[f"SM{sm}"], place):
            raise MachineError(
                "E0655",
                "build",
                f"unsupported compute capability: expected one of {', '.join(n for n in known if n[:2] == 'SM')}, "
                f"got SM{sm}",
                "give --compiler tensorrt",
            )


def _set_profile(builder: Any, config: Any, network: Any, settings: Settings) -> None:
    dynamic = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if any(size < 0 for size in tensor.shape):
            dynamic[tensor.name] = tuple(tensor.shape)
    for name in settings.profiles:
        if name not in dynamic:
            known = f"the inputs with dynamic shape are {', '.join(dynamic)}" if dynamic else "all shapes are fixed"
            raise UsageError("E0104", "build", f"--profile {name}: {known}", "leave it out")
    if missing := [name for name in dynamic if name not in settings.profiles]:
        problem = f"missing --profile for {missing[0]} of shape {dynamic[missing[0]]}"
        raise UsageError("E0103", "build", problem, f"give --profile {missing[0]}=MIN:OPT:MAX")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in settings.profiles.items():
        for shape in shapes:
            wanted = dynamic[name]
            if len(shape) != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, shape, strict=True)):
                text = "x".join(map(str, shape))
                problem = f"invalid --profile for {name}: expected shapes that fit {wanted}, got {text}"
                raise UsageError("E0104", "build", problem, "give MIN:OPT:MAX that fit")
        least, best, most = shapes
        if not all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
            problem = f"invalid --profile for {name}: the shapes do not grow from MIN to MAX: {shapes}"
            raise UsageError("E0104", "build", problem, "put them in order")
        profile.set_shape(name, tuple(least), tuple(best), tuple(most))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError("E0658", "build", "the builder refuses the profiles", "give other shapes")


def _load_plugin(registry: Any, path: Path, log: Any) -> None:
    handle = registry.load_library(str(path))
    log.check("plugin library")
    creators = [(creator.name, creator.plugin_namespace) for creator in registry.all_creators]
    if handle is None or ("NeuralMemory", "ai.titans") not in creators:
        raise MachineError(
            "E0607",
            "plugin library",
            f"{path} does not register ai.titans::NeuralMemory",
            "give --plugin-library the library that was built for this TensorRT's major version",
        )


def _inspect(trt: Any, plan: memoryview, settings: Settings) -> list[str]:
    """Layer names from the opened engine."""
    log = make_log(trt)
    runtime = trt.Runtime(log)
    if settings.embed_plugin:
        runtime.engine_host_code_allowed = True
    elif settings.plugin_library:
        runtime.get_plugin_registry().load_library(str(settings.plugin_library))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = (log.texts("ERROR", "INTERNAL_ERROR") or ["no reason given"])[0].rstrip(".")
        problem = f"the engine does not open on this device: {reason}"
        raise BuildError("E0658", "build", problem, "report this with the bundle")
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers", [])
    return [layer["Name"] if isinstance(layer, dict) else str(layer) for layer in layers]


def _flag(enumeration: Any, name: str) -> int:
    """The bit of a creation flag; 0 in releases that dropped the flag because it became the default."""
    member = enumeration.__members__.get(name)
    return 0 if member is None else 1 << int(member)
