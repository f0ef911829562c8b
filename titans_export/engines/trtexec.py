"""The build as trtexec commands, for devices without Python."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..errors import UsageError
from ..files import replacing_folder
from ..onnx.mapped import spilling, write_graph
from . import graphs, tensorrt
from .plan import Plan
from .targets import TENSORRT

SCRIPT = "build.sh"
# Enters the script's folder, whatever its name and CDPATH are.
_ENTER = 'case $0 in */*) CDPATH= cd -- "${0%/*}/" ;; esac'
_PREVIEW = "aliasedPluginIO1003"


def lines(plan: Plan) -> list[str]:
    """One command per graph, relative to the folder of the prepared graphs. Raises UsageError."""
    if plan.compiler != TENSORRT:
        problem = f"--emit-trtexec is for --compiler tensorrt, not {plan.compiler}"
        raise UsageError("E0102", "build", problem, "build it here instead")
    return [shlex.join(_arguments(plan, graph.name)) for graph in plan.graphs]


def _arguments(plan: Plan, graph: str) -> list[str]:
    request = plan.request
    library = request.plugin_library or Path(tensorrt.library_name(plan.target.tensorrt[0]))
    arguments = [
        "trtexec",
        f"--onnx={source_name(plan, graph)}",
        f"--saveEngine={plan.file(graph)}",
        f"--dynamicPlugins={library}",
        *([f"--setPluginsToSerialize={library}"] if request.embed_plugin else []),
        "--stronglyTyped",
        "--noTF32",
        f"--memPoolSize=workspace:{plan.workspace >> 20}M",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    if plan.alias == graphs.DECLARED:
        arguments.append(f"--preview=+{_PREVIEW}")
    if request.timing_cache:
        arguments.append(f"--timingCacheFile={request.timing_cache}")
    for place, word in enumerate(("min", "opt", "max")):
        if request.profiles:
            shapes = (f"{name}:{'x'.join(map(str, three[place]))}" for name, three in request.profiles.items())
            arguments.append(f"--{word}Shapes={','.join(shapes)}")
    return arguments


def source_name(plan: Plan, graph: str) -> str:
    """File name of the prepared graph."""
    return f"{plan.name}.{graph}.onnx"


def write_folder(plan: Plan, folder: Path, overwrite: bool) -> list[Path]:
    """Writes the prepared graphs and a script with the commands into a new folder. Returns the files."""
    text = "\n".join(lines(plan))
    with replacing_folder(folder, overwrite, SCRIPT) as aside:
        for graph in plan.graphs:
            with spilling(aside) as spill:
                write_graph(plan.prepare(graph, spill), aside / source_name(plan, graph.name))
        script = aside / SCRIPT
        script.write_bytes(os.fsencode(f"#!/bin/sh\nset -e\n{_ENTER}\n{text}\n"))
        script.chmod(0o755)
    return sorted(folder.iterdir())
