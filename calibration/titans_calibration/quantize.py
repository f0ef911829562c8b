"""From a bundle to a quantised one: data, observations, rewriting, writing."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from titans_calibration.collect import Collected, collect
from titans_calibration.data import Data, check_enough, read_data
from titans_calibration.graphs import quantise_graphs
from titans_calibration.instrument import load_models
from titans_calibration.matmuls import matmul_weights
from titans_calibration.memories import store_memories
from titans_calibration.recipe import Recipe
from titans_calibration.sensitivity import choose_mixture, split_held_back
from titans_calibration.writing import load_graphs, write_quantised
from titans_export.bundle import MANIFEST, Bundle, read_bundle
from titans_export.engines.targets import FP8_FROM, Target, find_target
from titans_export.errors import MachineError, UsageError
from titans_export.files import check_output

TOKENS = 1 << 15

Progress = Callable[[str], None]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class QuantizeReport:
    """What was done. `activations` and `memory`: the ranges observed, by window of positions, empty without data.

    matmuls: format of each matmul's weight. kept: why those in float32 are. max_abs_error: of the outputs from the
    float32 model's golden ones. mixed: what was measured of each matmul, None for a recipe without a budget.
    """

    bundle: str
    recipe: dict[str, Any]
    data: dict[str, Any] | None
    tokens: int
    seed: int
    resumed_at: int
    weights_bytes: int
    float32_weights_bytes: int
    state_bytes: int
    float32_state_bytes: int
    max_abs_error: float
    tolerance: float
    matmuls: dict[str, str]
    kept: dict[str, str]
    embeddings: dict[str, str]
    activations: dict[str, list[list[float]]]
    memory: dict[str, list[list[float]]]
    mixed: dict[str, Any] | None
    seconds: float


@dataclass(frozen=True)
class QuantizePlan:
    """What would be done. matmuls: how many weights, elements: in all of them."""

    bundle: str
    recipe: dict[str, Any]
    data: dict[str, Any] | None
    matmuls: int
    elements: int
    kept: dict[str, str]
    target: str | None


def work_file(output: Path) -> Path:
    """Where a collection that was stopped goes on from, beside the output."""
    return output.with_name(f".{output.name}.calibration")


def sweep_file(output: Path) -> Path:
    """Where a sweep of a mixed recipe that was stopped goes on from, beside the output."""
    return output.with_name(f".{output.name}.sweep")


def check_target(recipe: Recipe, name: str) -> Target:
    """The target, if it can run the recipe. Raises UsageError for an unknown one, MachineError where it cannot."""
    target = find_target(name)
    if recipe.weights.format == "fp8" and (target.sm is None or target.sm < FP8_FROM):
        expected = f"a target of compute capability {FP8_FROM / 10:.1f} or more, as {recipe.name} computes in fp8"
        got = "a CPU" if target.sm is None else f"{name} with {target.sm / 10:.1f}"
        raise MachineError("quantize", expected, got, "take --recipe int8 or int4-weight-only")
    return target


def quantize_bundle(
    bundle: Path,
    output: Path,
    recipe: Recipe,
    data: Sequence[Path] = (),
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    overwrite: bool = False,
    target: str | None = None,
    progress: Progress = lambda text: None,
    bar: Bar = lambda label, total: nullcontext(lambda done: None),
) -> QuantizeReport:
    """Writes the quantised form of the bundle at `bundle` to `output`.

    Streams of the files, of `tokens` tokens in all at most, say what ranges to quantise to; a recipe that needs none
    leaves them alone. `seed` draws pieces of longer files. If a run is stopped the next one of the same arguments goes
    on where it was. The runtime runs the new bundle before it takes its name. Raises TitansError.
    """
    began = time.monotonic()
    source, streams = _prepare(bundle, output, recipe, data, tokens, seed, overwrite, target)
    collected, mixture, held_back = Collected({}), None, None
    if streams is not None:
        seen = streams
        if recipe.mixed is not None:
            seen, held_back = split_held_back(source, streams, recipe.mixed.held_back)
        check_enough(source, seen)
        progress(f"observing {seen.tokens} tokens in {len(seen.streams)} streams")
        with bar("observing", seen.tokens) as step:
            collected = collect(source, seen, gram=recipe.needs_gram, work=work_file(output), progress=step)
        if collected.resumed_at:
            progress(f"went on from {collected.resumed_at} tokens observed before")
    observations = collected.observations if streams is not None else None
    with threadpool_limits(1, "blas"):  # as in collecting
        if held_back is not None:
            mixture = choose_mixture(source, recipe, observations, held_back, progress, sweep_file(output))
        progress("quantising")
        formats = mixture.formats if mixture else None
        quantised = quantise_graphs(load_graphs(source), recipe, observations, formats)
    for pattern in _idle_patterns(source, recipe):
        progress(f"no weight is named {pattern}, which was to be kept in float32")
    entry = streams.entry() if streams is not None else None
    written = write_quantised(
        source, output, quantised, recipe, data=entry, seed=seed, overwrite=overwrite, progress=progress
    )
    for file in (work_file(output), sweep_file(output)):
        file.unlink(missing_ok=True)
    return QuantizeReport(
        bundle=str(output),
        recipe=recipe.as_dict(),
        data=entry,
        tokens=streams.tokens if streams is not None else 0,
        seed=seed,
        resumed_at=collected.resumed_at,
        weights_bytes=written.weights_bytes,
        float32_weights_bytes=written.float32_weights_bytes,
        state_bytes=_state_bytes(read_bundle(output)),
        float32_state_bytes=_state_bytes(source),
        max_abs_error=written.max_abs_error,
        tolerance=written.tolerance,
        matmuls=quantised.report.matmuls,
        kept=quantised.report.kept,
        embeddings=quantised.report.embeddings,
        activations={name: [list(w) for w in seen.windows] for name, seen in collected.observations.items()},
        memory={
            name: [[at, *ranges[at]] for at in sorted(ranges)] for name, ranges in sorted(collected.memory.items())
        },
        mixed=dataclasses.asdict(mixture) if mixture else None,
        seconds=round(time.monotonic() - began, 1),
    )


def plan_quantize(
    bundle: Path,
    output: Path | None,
    recipe: Recipe,
    data: Sequence[Path] = (),
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    overwrite: bool = False,
    target: str | None = None,
) -> QuantizePlan:
    """What `quantize_bundle` would do, every check of its arguments included. Raises TitansError."""
    source, streams = _prepare(bundle, output, recipe, data, tokens, seed, overwrite, target)
    if streams is not None:
        seen = streams
        if recipe.mixed is not None:
            seen, _ = split_held_back(source, streams, recipe.mixed.held_back)
        check_enough(source, seen)
    plain = dataclasses.replace(recipe, activations=None, smooth=None, mixed=None)
    plain = dataclasses.replace(plain, weights=dataclasses.replace(recipe.weights, method="minmax"))
    models = load_graphs(source)
    report = quantise_graphs(models, dataclasses.replace(plain, memory=type(recipe.memory)()), None).report
    sizes = matmul_weights(models)
    return QuantizePlan(
        bundle=str(bundle),
        recipe=recipe.as_dict(),
        data=streams.entry() if streams is not None else None,
        matmuls=len(report.matmuls) - len(report.kept),
        elements=sum(math.prod(sizes[name]) for name in report.matmuls if name in sizes and name not in report.kept),
        kept=report.kept,
        target=target,
    )


def _prepare(
    bundle: Path,
    output: Path | None,
    recipe: Recipe,
    files: Sequence[Path],
    tokens: int,
    seed: int,
    overwrite: bool,
    target: str | None,
) -> tuple[Bundle, Data | None]:
    """Everything that can be refused before any work is done."""
    if target is not None:
        check_target(recipe, target)
    source = read_bundle(bundle)
    if source.quantization is not None:
        got = f"{bundle}, which is quantised already"
        raise UsageError("quantize", "a bundle in float32", got, "give the bundle that it was made from")
    if output is not None:
        if os.path.realpath(bundle) == os.path.realpath(output):
            raise UsageError("quantize", "another name for the new bundle", str(output), "give another -o")
        check_output(output, overwrite, MANIFEST)
    if recipe.memory.dtype != "float32":
        store_memories(load_models(source, weights=False), source.manifest.raw["state"], recipe.memory)
    if not recipe.needs_data:
        return source, None
    if not files:
        expected = f"--data FILE with the recipe {recipe.name}, which is found from what the model does over data"
        raise UsageError("quantize", expected, "none", "give text of the kind that the model will read")
    return source, read_data(source, files, tokens, seed)


def _idle_patterns(bundle: Bundle, recipe: Recipe) -> list[str]:
    """Those of the weights to keep that name none."""
    models = load_models(bundle, weights=False).values()
    names = {tensor.name for model in models for tensor in model.graph.initializer}
    return [pattern for pattern in recipe.keep if not fnmatch.filter(names, pattern)]


def format_counts(matmuls: dict[str, str]) -> str:
    """`38 int8, 4 float32`."""
    return ", ".join(f"{count} {format}" for format, count in Counter(matmuls.values()).most_common())


def _state_bytes(bundle: Bundle) -> int:
    return sum(4 * math.prod(entry.shape) for entry in bundle.manifest.state)
