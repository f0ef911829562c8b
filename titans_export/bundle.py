"""The bundle on disk: reading with every check. docs/bundle.md is the contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from . import trust
from .errors import BundleError
from .files import utf8_path
from .golden import GOLDEN, Golden, read_golden
from .manifest import MANIFEST, FileRecord, Manifest, Quantization, read_manifest
from .output_limits import OutputLimits, limits_of

WEIGHTS, STATE, TOKENIZER = "weights.safetensors", "state.safetensors", "tokenizer.json"
_FIX = "copy or export the bundle again"

__all__ = ["GOLDEN", "MANIFEST", "STATE", "TOKENIZER", "WEIGHTS", "Bundle", "file_record", "read_bundle"]


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file as a manifest records them."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, xxh3_128=digest.hexdigest())


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files exist and match the manifest."""

    path: Path
    manifest: Manifest

    def graph_paths(self) -> dict[str, Path]:
        """Graph name to its ONNX file, in the manifest's order."""
        return {graph.name: self.path / graph.file for graph in self.manifest.graphs}

    @property
    def tolerance(self) -> float:
        """The largest absolute difference that outputs may have from the golden ones."""
        return float(self.manifest.golden.tolerance)

    def limits(self, tolerance: float | None = None) -> OutputLimits:
        """The largest errors of outputs by position; tolerance: the user's own, as in `limits_of`."""
        return limits_of(self.manifest, tolerance)

    @property
    def takes_vectors(self) -> bool:
        """Whether streams consume vectors of floats instead of tokens."""
        return self.manifest.input.kind == "vectors"

    @property
    def quantization(self) -> Quantization | None:
        """What `titans-export quantize` did, None for a float32 bundle."""
        return self.manifest.quantization

    def golden(self) -> Golden:
        """Inputs of one stream and its right outputs. Raises BundleError."""
        return read_golden(self.path, self.manifest)

    def initial_state(self) -> dict[str, NDArray[np.float32]]:
        """The state of a fresh stream, by name."""
        from safetensors.numpy import load_file

        with utf8_path(self.path / self.manifest.initial_state.file) as path:
            return load_file(path)


def read_bundle(path: Path) -> Bundle:
    """Opens the bundle at `path` and checks its manifest, sizes, hashes and graphs. Raises BundleError."""
    manifest = read_manifest(path)
    trust.current().check(path, manifest)
    for name, record in manifest.files.items():
        file = path / name
        try:
            regular = not file.is_symlink() and file.is_file()
        except (OSError, ValueError):  # a name that no file can have
            regular = False
        if not regular:
            raise BundleError("E0206", name, f"no such regular file in {path}", _FIX)
        if (size := file.stat().st_size) != record.bytes:
            raise BundleError("E0204", name, f"damaged file: expected {record.bytes} bytes, got {size}", _FIX)
        if (found := file_record(file).xxh3_128) != record.xxh3_128:
            raise BundleError("E0204", name, f"damaged file: expected hash {record.xxh3_128}, got {found}", _FIX)
    _check_graphs(path, manifest)
    return Bundle(path, manifest)


def _check_graphs(path: Path, manifest: Manifest) -> None:
    """Checks that all readers read the graphs alike, and that these have known operators and read known files only.

    Raises BundleError.
    """
    files = {manifest.weights.file}
    for graph in manifest.graphs:
        _check_graph(path / graph.file, files, compiled=False)
    for engine in manifest.engines:
        if engine.compiler == "onnxruntime":
            own = {engine.weights.file} if engine.weights else set()
            for compiled in engine.graphs:
                _check_graph(path / compiled.file, files | own, compiled=True)


def _check_graph(path: Path, files: set[str], compiled: bool) -> None:
    from .onnx.encoding import parse_model
    from .onnx.external import check_external_data
    from .operators.allowed import check_operators

    model = parse_model(path.read_bytes(), path.name)
    check_external_data(model, path.name, files)
    if not trust.current().any_operator:
        check_operators(model, path.name, compiled)
