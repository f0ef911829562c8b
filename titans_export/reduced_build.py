"""The operators that a reduced build of ONNX Runtime needs for a bundle, in the format of its build script."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime

from .bundle import Bundle
from .engines.onnxruntime import kernel_library
from .operators import DOMAIN
from .running import open_session

ONNX, FUSED = "ai.onnx", "com.microsoft"


def operators(bundle: Bundle, standard: bool) -> dict[tuple[str, int], set[str]]:
    """Names of operators by domain and opset version, before and after ONNX Runtime's optimisation.

    standard: for a runtime without our kernels, which runs the memory as standard operators. Needs the kernel library
    unless `standard`.
    """
    kernel = None if standard else kernel_library()
    found: dict[tuple[str, int], set[str]] = {}
    for path in bundle.graph_paths().values():
        for model in (onnx.load(path, load_external_data=False), _optimised(path, kernel)):
            versions = {entry.domain or ONNX: entry.version for entry in model.opset_import}
            for domain, name in _nodes(model, standard):
                if domain != DOMAIN:
                    found.setdefault((domain, versions.get(domain, 1)), set()).add(name)
    return found


def config(found: dict[tuple[str, int], set[str]]) -> str:
    """The file for `--include_ops_by_config`: a line `domain;version;names` for each domain and version."""
    return "".join(
        f"{domain};{version};{','.join(sorted(names))}\n" for (domain, version), names in sorted(found.items())
    )


def _optimised(path: Path, kernel: Path | None) -> onnx.ModelProto:
    """The graph after the optimisation that the runtime uses too."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(target)
        open_session(path, kernel=kernel, options=options)
        return onnx.load(target, load_external_data=False)


def _nodes(model: onnx.ModelProto, functions: bool) -> Iterator[tuple[str, str]]:
    yield from _of_graph(model.graph.node)
    if functions:
        for function in model.functions:
            yield from _of_graph(function.node)


def _of_graph(nodes: object) -> Iterator[tuple[str, str]]:
    for node in nodes:  # type: ignore[attr-defined]
        yield node.domain or ONNX, node.op_type
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph.node)
