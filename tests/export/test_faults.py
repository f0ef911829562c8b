"""`verify` finds every altered node and constant of every graph, whatever the vocabulary."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults import altered, altered_graph, faults_of, is_valid
from numpy.typing import NDArray
from shared_bundles import made_once

from titans_export.bundle import Bundle, read_bundle
from titans_export.checkpoints.titans import save
from titans_export.exporting import export_checkpoint
from titans_export.golden import Golden
from titans_export.model import MemoryConfig, ModelConfig, Titans
from titans_export.reference import FLOAT32_SHARE
from titans_export.running import BundleRunner, memory_kernel, open_session
from titans_export.verifying import verify_blocks

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

POSITIONS = 256
ATTENTION = {"attention_heads": 2, "window": 16, "persistent": 2}
VARIANTS: dict[str, tuple[int, MemoryConfig]] = {
    "mac": (152_064, MemoryConfig(2, 8, 8)),
    "mag": (152_064, MemoryConfig(2, 8, 8, depth=2, activation="gelu")),
    "mal": (256, MemoryConfig(2, 8, 8, depth=2, residual=True)),
    "lmm": (50_257, MemoryConfig(2, 8, 8, layer_norm=True, step_limit=0.1)),
}


def _export(variant: str, path: Path) -> None:
    vocabulary, memory = VARIANTS[variant]
    attention = {} if variant == "lmm" else ATTENTION
    torch.manual_seed(3)
    model = Titans(ModelConfig(variant, vocabulary, 32, 1, 32, memory, **attention))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))
            if key.endswith("gates.bias"):
                p[2 * memory.heads :] += 3  # forget a few per cent a token, so that the stream is stable
        model.head.weight.mul_(10)  # logits as large as those of trained models
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, variant))
        export_checkpoint(Path(folder, variant), path, chunks_per_call=4, positions=POSITIONS)


MAKES = {name: partial(_export, name) for name in VARIANTS}


@pytest.fixture(scope="module", params=MAKES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of each bundle, whose graphs tests may exchange."""
    name = request.param
    folder = tmp_path_factory.mktemp("faults") / f"{name}.titans"
    return read_bundle(Path(shutil.copytree(made_once(f"faults-{name}", MAKES[name]), folder)))


def verified(bundle: Bundle, golden: Golden) -> bool:
    """Whether `verify` passes the bundle as it is now. The runtime may refuse it instead."""
    try:
        with rt.Session(bundle.path) as session:
            reports = verify_blocks(session, golden.inputs, golden, bundle.tolerance)
            return all(report.passed for report in reports)
    except rt.Error:
        return False


class Outputs:
    """Outputs in ONNX Runtime of the golden stream, along a schedule with one graph and the decode graphs."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        self.bundle, self.graph = bundle, bundle.manifest.graph(graph)
        self.inputs = bundle.golden().inputs
        self.right = np.concatenate(list(self.of(None)))

    def of(self, model: onnx.ModelProto | None) -> Iterator[NDArray[np.float32]]:
        """Outputs of each call, with this model instead of the graph's file."""
        kernel = memory_kernel()

        def session(entry: Any) -> Any:
            if model is None or entry.name != self.graph.name:
                return open_session(self.bundle.path / entry.file, kernel=kernel)
            return open_session(model, kernel=kernel, folder=self.bundle.path)

        runner = BundleRunner(self.bundle, session)
        runner.graphs = tuple(g for g in runner.graphs if g.tokens == 1 or g == self.graph)
        for call in runner.stream(self.inputs):
            yield call.values[runner.output][0]

    def difference(self, model: onnx.ModelProto) -> float:
        """Largest difference of an output; 0 only for identical bits."""
        worst, at = 0.0, 0
        for rows in self.of(model):
            right = self.right[at : at + len(rows)]
            at += len(rows)
            if rows.tobytes() != right.tobytes():
                worst = max(worst, float(np.nan_to_num(np.abs(rows - right).max(), nan=np.inf)), 1e-30)
        return worst


def check(bundle: Bundle, graph: str, count: int, most: int | None = None) -> None:
    """Alters the graph in `count` places of each kind, at most `most` in all, and demands that `verify` finds each.

    A fault is left out if ONNX Runtime's outputs over the golden stream show none: bits are identical, or differ as
    two ways of rounding may. Each way is within FLOAT32_SHARE of the tolerance of the right outputs.
    """
    rng = np.random.default_rng(zlib.crc32(f"{bundle.path.name} {graph}".encode()))
    golden, right, missed, found = bundle.golden(), None, [], 0
    faults = faults_of(bundle.path, graph, rng, count)
    for index in rng.permutation(len(faults))[:most]:
        model = altered_graph(bundle.path, faults[index])
        if not is_valid(model):
            continue
        with altered(bundle.path, graph, model):
            passed = verified(bundle, golden)
        if not passed:
            found += 1
            continue
        right = right or Outputs(bundle, graph)
        if (error := right.difference(model)) > 2 * FLOAT32_SHARE * bundle.tolerance:
            missed.append(f"{faults[index]}: {error:.2g}")
    assert not missed
    assert found >= (len(faults) if most is None else min(most, len(faults))) // 2, "most alterations are faults"


def graph_names(bundle: Bundle) -> list[str]:
    return [graph.name for graph in bundle.manifest.graphs]


@pytest.mark.parametrize("bundle", ["lmm"], indirect=True)
def test_a_sample_of_faults_is_found(bundle: Bundle) -> None:
    assert verified(bundle, bundle.golden())
    for graph in graph_names(bundle):
        check(bundle, graph, 1, 5)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_kind_of_fault_is_found(bundle: Bundle) -> None:
    assert verified(bundle, bundle.golden())
    for graph in graph_names(bundle):
        check(bundle, graph, 1)
