"""Writes a quantised bundle and measures its error."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from titans_calibration.graphs import Quantised
from titans_calibration.memories import store_memories, store_rows
from titans_export import __version__, trust
from titans_export.bundle import MANIFEST, STATE, WEIGHTS, Bundle, file_record
from titans_export.errors import MismatchError
from titans_export.files import replacing_folder
from titans_export.manifest import CalibrationData, FileReference, MemoryFormat, Quantization
from titans_export.onnx.nodes import copy_model
from titans_export.onnx.weights import share_weights
from titans_export.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from titans_calibration.options import QuantizeOptions

_FEED_BYTES = 64 << 20  # most outputs of a feed, unless a graph's calls have more


@dataclass(frozen=True)
class Written:
    """Sizes in bytes. max_abs_error: largest absolute difference of outputs from the golden ones."""

    weights_bytes: int
    float32_weights_bytes: int
    state_bytes: int
    max_abs_error: float
    tolerance: float


def write_quantised(
    bundle: Bundle,
    quantised: Quantised,
    options: QuantizeOptions,
    *,
    data: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Written:
    """Writes the quantised form of `bundle` to `options.output`, without engines.

    `data` is the manifest's entry of the data: hash, tokens and streams. The runtime runs the new bundle over the
    golden inputs before it is renamed into place. Raises TitansError, or titans_runtime.Error if no kernel on this
    machine supports the memory dtype; then nothing is written.
    """
    assert options.output is not None
    recipe = options.recipe
    with replacing_folder(options.output, options.overwrite, MANIFEST) as folder:
        models = {name: copy_model(model) for name, model in quantised.models.items()}
        before = bundle.manifest
        state, rows = before.state, bundle.initial_state()
        if recipe.memory.dtype != "float32":
            state = store_memories(models, before.state, recipe.memory)
            rows = store_rows(rows, before.state, state)
        shared = share_weights(models, folder / WEIGHTS)
        graphs = tuple(replace(graph, weights=tuple(shared[graph.name])) for graph in before.graphs)
        for graph in graphs:
            (folder / graph.file).write_bytes(models[graph.name].SerializeToString(deterministic=True))
        write_safetensors(folder / STATE, rows)
        for name in (before.golden.file, before.tokenizer.file):
            if name is not None:
                shutil.copyfile(bundle.path / name, folder / name)
        weights_bytes = (folder / WEIGHTS).stat().st_size
        float32_weights_bytes = (bundle.path / before.weights.file).stat().st_size
        quantization = Quantization(
            recipe=recipe.as_dict(),
            data=None if data is None else CalibrationData.from_json(dict(data), "quantization.data"),
            seed=options.seed,
            matmuls=quantised.report.matmuls,
            memory=MemoryFormat(dtype=recipe.memory.dtype, rounding=recipe.memory.rounding, seed=recipe.memory.seed),
            weights_bytes=weights_bytes,
            float32_weights_bytes=float32_weights_bytes,
            max_abs_error=0.0,
        )
        manifest = replace(
            before,
            producer=f"titans-export {__version__}",
            state=state,
            graphs=graphs,
            weights=FileReference(file=WEIGHTS),
            initial_state=FileReference(file=STATE),
            files={path.name: file_record(path) for path in sorted(folder.iterdir())},
            quantization=quantization,
            engines=(),
        )
        manifest.write(folder)
        progress("comparing the quantised bundle with the float32 model")
        error = golden_error(bundle, folder)
        tolerance = tolerance_of(error, bundle.tolerance)
        replace(
            manifest,
            quantization=replace(quantization, max_abs_error=error),
            golden=replace(before.golden, tolerance=tolerance),
        ).write(folder)
        return Written(
            weights_bytes,
            float32_weights_bytes,
            sum(values.nbytes for values in rows.values()),
            error,
            tolerance,
        )


def golden_error(bundle: Bundle, folder: Path) -> float:
    """The largest absolute difference of the outputs of the bundle in `folder` from the golden ones of `bundle`."""
    import titans_runtime

    golden = bundle.golden()
    largest = max(graph.tokens for graph in bundle.manifest.graphs)
    most = max(2 * largest, _FEED_BYTES // (4 * golden.size))
    worst = 0.0
    with titans_runtime.Session(folder, guard="off", **trust.current().operators) as session:
        stream = session.stream()
        at = 0
        for length in _lengths(len(golden.inputs), most):
            found = stream.feed(golden.inputs[at : at + length])
            assert found is not None
            worst, at = max(worst, float(golden.errors(_finite(found, at), at).max())), at + length
    return worst


def tolerance_of(error: float, before: float) -> float:
    """Twice the measured error, rounded up to one digit, at least `before`."""
    if 2 * error <= before:
        return before
    unit = 10.0 ** math.floor(math.log10(2 * error))
    return max(before, float(f"{math.ceil(2 * error / unit - 1e-9) * unit:.1g}"))


def _lengths(count: int, most: int) -> Iterator[int]:
    """Uneven lengths up to `most` with the sum `count`, so that graphs of every length run."""
    length, left = 1, count
    while left:
        yield min(length, most, left)
        left -= min(length, most, left)
        length = length * 3 % 1021


def _finite(outputs: NDArray[np.float32], position: int) -> NDArray[np.float32]:
    if not np.isfinite(outputs).all():
        bad = position + int(np.argmin(np.isfinite(outputs).all(axis=-1)))
        raise MismatchError(
            "E0808", "quantize", f"outputs are not finite from position {bad}", "take a recipe with more bits"
        )
    return outputs
