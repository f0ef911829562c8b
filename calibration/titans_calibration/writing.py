"""The files of a quantised bundle, and how far it is from the float32 model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from titans_calibration.graphs import Quantised
from titans_calibration.memories import store_memories, store_rows
from titans_export import __version__
from titans_export.bundle import MANIFEST, STATE, WEIGHTS, Bundle, file_record
from titans_export.errors import MismatchError
from titans_export.files import replacing_folder
from titans_export.onnx.nodes import copy_model
from titans_export.onnx.weights import share_weights
from titans_export.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from titans_calibration.options import QuantizeOptions

_KEPT = ("golden", "tokenizer")


@dataclass(frozen=True)
class Written:
    """What was written. max_abs_error: of the outputs from the golden ones, which are the float32 model's."""

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
        raw = bundle.manifest.raw
        before = raw["state"]
        state = [dict(entry) for entry in before]
        rows = bundle.initial_state()
        if recipe.memory.dtype != "float32":
            state = store_memories(models, before, recipe.memory)
            rows = store_rows(rows, before, state)
        shared = share_weights(models, folder / WEIGHTS)
        graphs = [{**entry, "weights": shared[entry["name"]]} for entry in raw["graphs"]]
        for entry in graphs:
            content = models[entry["name"]].SerializeToString(deterministic=True)
            (folder / entry["file"]).write_bytes(content)
        write_safetensors(folder / STATE, rows)
        for key in _KEPT:
            if name := raw[key].get("file"):
                shutil.copyfile(bundle.path / name, folder / name)
        weights = bundle.manifest.weights.file
        quantization: dict[str, Any] = {
            "recipe": recipe.as_dict(),
            "data": dict(data) if data is not None else None,
            "seed": options.seed,
            "matmuls": quantised.report.matmuls,
            "memory": {
                "dtype": recipe.memory.dtype,
                "rounding": recipe.memory.rounding,
                "seed": recipe.memory.seed,
            },
            "weights_bytes": (folder / WEIGHTS).stat().st_size,
            "float32_weights_bytes": (bundle.path / weights).stat().st_size,
            "max_abs_error": 0.0,
        }
        manifest = {
            **{key: value for key, value in raw.items() if key != "engines"},
            "producer": f"titans-export {__version__}",
            "state": state,
            "graphs": graphs,
            "weights": {"file": WEIGHTS},
            "initial_state": {"file": STATE},
            "quantization": quantization,
            "files": {path.name: file_record(path).to_json() for path in sorted(folder.iterdir())},
        }
        _write_manifest(folder, manifest)
        progress("comparing the quantised bundle with the float32 model")
        error = golden_error(bundle, folder)
        tolerance = tolerance_of(error, bundle.tolerance)
        quantization["max_abs_error"] = error
        manifest["golden"] = {**raw["golden"], "tolerance": tolerance}
        _write_manifest(folder, manifest)
        return Written(
            quantization["weights_bytes"],
            quantization["float32_weights_bytes"],
            sum(values.nbytes for values in rows.values()),
            error,
            tolerance,
        )


def golden_error(bundle: Bundle, folder: Path) -> float:
    """How far the outputs of the bundle in `folder` are from the golden ones of `bundle`, absolute, at most."""
    import titans_runtime

    inputs, outputs = bundle.golden()
    worst = 0.0
    with titans_runtime.Session(folder) as session:
        stream = session.stream()
        at = 0
        for length in _lengths(len(inputs)):
            found = stream.feed(inputs[at : at + length])
            assert found is not None
            error = float(np.abs(_finite(found, at) - outputs[at : at + length]).max())
            worst, at = max(worst, error), at + length
    return worst


def tolerance_of(error: float, before: float) -> float:
    """Twice the measured error rounded up to one digit, and no less than it was."""
    if 2 * error <= before:
        return before
    unit = 10.0 ** math.floor(math.log10(2 * error))
    return max(before, float(f"{math.ceil(2 * error / unit - 1e-9) * unit:.1g}"))


def _lengths(count: int) -> Iterator[int]:
    """Uneven ones that add up to `count`, so that graphs of every length run."""
    length, left = 1, count
    while left:
        yield min(length, left)
        left -= min(length, left)
        length = length * 3 % 1021


def _finite(outputs: NDArray[np.float32], position: int) -> NDArray[np.float32]:
    if not np.isfinite(outputs).all():
        bad = position + int(np.argmin(np.isfinite(outputs).all(axis=-1)))
        raise MismatchError(
            "E0808", "quantize", f"outputs are not finite from position {bad}", "take a recipe with more bits"
        )
    return outputs


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
