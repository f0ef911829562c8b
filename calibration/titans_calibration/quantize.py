"""From a float32 bundle to a quantised one: observe, choose, rewrite, write."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from titans_calibration.collect import Collected, collect
from titans_calibration.data import Data, check_enough, read_data
from titans_calibration.graphs import choose_formats, quantise_graphs
from titans_calibration.matmuls import FLOAT32, find_matmuls
from titans_calibration.memories import check_memories
from titans_calibration.options import QuantizeOptions, sweep_file, work_file
from titans_calibration.recipe import MemoryRecipe, Recipe
from titans_calibration.sensitivity import Mixture, choose_mixture, split_held_back
from titans_calibration.source import Source, open_source
from titans_calibration.writing import write_quantised
from titans_export.bundle import MANIFEST, Bundle, read_bundle
from titans_export.engines.targets import FP8_FROM, Target, find_target
from titans_export.errors import MachineError, UsageError
from titans_export.files import check_output
from titans_export.onnx.mapped import spilling

_LARGEST_SAVING = 8  # int4 weights are an eighth of float32: no recipe writes less

Progress = Callable[[str], None]
Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantisation did.

    matmuls: format of each weight. kept: why a weight stays float32. activations, memory: observed ranges by window of
    positions, empty without data. max_abs_error: of the outputs from the golden ones. mixed: None without a budget.
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
    """What a quantisation would do. matmuls: number of weights, elements: in all of them."""

    bundle: str
    recipe: dict[str, Any]
    data: dict[str, Any] | None
    matmuls: int
    elements: int
    kept: dict[str, str]
    target: str | None


@dataclass(frozen=True)
class _Job:
    """A checked quantisation. seen: what ranges are found from. held_back: what a mixture is measured on."""

    options: QuantizeOptions
    source: Source
    data: Data | None = None
    seen: Data | None = None
    held_back: Data | None = None


@dataclass(frozen=True)
class _Found:
    """What the data showed."""

    collected: Collected = field(default_factory=lambda: Collected({}))
    mixture: Mixture | None = None


def check_target(recipe: Recipe, name: str) -> Target:
    """The target, if it can run the recipe. Raises UsageError for an unknown one, MachineError if it cannot."""
    target = find_target(name)
    if recipe.weights.format == "fp8" and (target.sm is None or target.sm < FP8_FROM):
        got = "is a CPU" if target.sm is None else f"has {target.sm / 10:.1f}"
        raise MachineError(
            "E0813",
            "quantize",
            f"{name} cannot compute in fp8: {recipe.name} needs compute capability {FP8_FROM / 10:.1f}, {name} {got}",
            "take --recipe int8 or int4-weight-only",
        )
    return target


def quantize_bundle(
    options: QuantizeOptions,
    *,
    progress: Progress = lambda text: None,
    bar: Bar = lambda label, total, unit: nullcontext(lambda done: None),
) -> QuantizeReport:
    """Writes the quantised form of `options.bundle` to `options.output`.

    An interrupted run continues when it is started again with the same options. The runtime runs the new bundle before
    it is renamed into place. Raises TitansError.
    """
    began = time.monotonic()
    job = _prepare(options)
    found = _observe(job, progress, bar)
    progress("quantising")
    assert options.output is not None
    entry = job.data.entry() if job.data is not None else None
    with spilling(options.output.resolve().parent) as spill:
        elements = sum(matmul.matrix.size for matmul in find_matmuls(job.source.models).values())
        # One thread: the same sums on every machine.
        with threadpool_limits(1, "blas"), bar("quantising", elements, "weight") as step:
            quantised = quantise_graphs(
                job.source.models,
                options.recipe,
                found.collected.observations if job.seen is not None else None,
                found.mixture.formats if found.mixture else None,
                spill=spill,
                progress=step,
            )
        for seen in found.collected.observations.values():
            seen.gram = None  # large, and the session that checks the result needs the memory
        for pattern in _idle_patterns(job):
            progress(f"no weight matches {pattern} of keep")
        written = write_quantised(job.source.bundle, quantised, options, data=entry, progress=progress)
    for file in _work_files(options):
        file.unlink(missing_ok=True)
    collected = found.collected
    return QuantizeReport(
        bundle=str(options.output),
        recipe=options.recipe.as_dict(),
        data=entry,
        tokens=job.data.tokens if job.data is not None else 0,
        seed=options.seed,
        resumed_at=collected.resumed_at,
        weights_bytes=written.weights_bytes,
        float32_weights_bytes=written.float32_weights_bytes,
        state_bytes=written.state_bytes,
        float32_state_bytes=state_bytes(job.source.bundle),
        max_abs_error=written.max_abs_error,
        tolerance=written.tolerance,
        matmuls=quantised.report.matmuls,
        kept=quantised.report.kept,
        embeddings=quantised.report.embeddings,
        activations={name: [list(w) for w in seen.windows] for name, seen in collected.observations.items()},
        memory={
            name: [[at, *ranges[at]] for at in sorted(ranges)] for name, ranges in sorted(collected.memory.items())
        },
        mixed=dataclasses.asdict(found.mixture) if found.mixture else None,
        seconds=round(time.monotonic() - began, 1),
    )


def plan_quantize(options: QuantizeOptions) -> QuantizePlan:
    """What `quantize_bundle` would do, with every check of the options. Raises TitansError."""
    job, recipe = _prepare(options), options.recipe
    plain = dataclasses.replace(
        recipe,
        weights=dataclasses.replace(recipe.weights, method="minmax"),
        activations=None,
        smooth=None,
        memory=MemoryRecipe(),
        mixed=None,
    )
    chosen = choose_formats(job.source.models, plain, None)
    quantised = [matmul for matmul in chosen.values() if matmul.format != FLOAT32]
    return QuantizePlan(
        bundle=str(options.bundle),
        recipe=recipe.as_dict(),
        data=job.data.entry() if job.data is not None else None,
        matmuls=len(quantised),
        elements=sum(matmul.matrix.size for matmul in quantised),
        kept={name: matmul.why for name, matmul in sorted(chosen.items()) if matmul.format == FLOAT32},
        target=options.target,
    )


def _prepare(options: QuantizeOptions) -> _Job:
    """Opens the bundle and the data, and refuses everything that can be refused before any work."""
    recipe = options.recipe
    _check_output(options)
    if options.target is not None:
        check_target(recipe, options.target)
    bundle = read_bundle(options.bundle)
    _check_output(options, sum(file.bytes for file in bundle.manifest.files.values()) // _LARGEST_SAVING)
    source = open_source(bundle)
    check_memories(source, recipe.memory)
    if not recipe.needs_data:
        return _Job(options, source)
    if not options.data:
        raise UsageError(
            "E0103",
            "quantize",
            f"--data is missing: the recipe {recipe.name} needs ranges from data",
            "give text of the kind that the model will read",
        )
    data = read_data(source.bundle, options.data, options.tokens, options.seed, options.encoding_errors)
    seen, held_back = data, None
    if recipe.mixed is not None:
        seen, held_back = split_held_back(source.bundle, data, recipe.mixed.held_back)
    check_enough(source.bundle, seen)
    return _Job(options, source, data, seen, held_back)


def _check_output(options: QuantizeOptions, needs: int = 0) -> None:
    if options.output is None:
        return
    if os.path.realpath(options.bundle) == os.path.realpath(options.output):
        raise UsageError("E0102", "quantize", f"-o {options.output} is the bundle itself", "give another name to -o")
    check_output(options.output, options.overwrite, MANIFEST, source=options.bundle, needs=needs)


def _observe(job: _Job, progress: Progress, bar: Bar) -> _Found:
    """Runs the bundle over the data, and measures mixtures if the recipe has a budget."""
    if job.seen is None:
        return _Found()
    work, sweep = _work_files(job.options)
    progress(f"observing {job.seen.tokens} tokens in {len(job.seen.streams)} streams")
    with bar("observing", job.seen.tokens, "token") as step:
        collected = collect(job.source, job.seen, gram=job.options.recipe.needs_gram, work=work, progress=step)
    if collected.resumed_at:
        progress(f"continued after {collected.resumed_at} tokens that were observed before")
    if job.held_back is None:
        return _Found(collected)
    with threadpool_limits(1, "blas"):
        mixture = choose_mixture(job.source, job.options.recipe, collected.observations, job.held_back, progress, sweep)
    return _Found(collected, mixture)


def _work_files(options: QuantizeOptions) -> tuple[Path, Path]:
    assert options.output is not None
    return work_file(options.output), sweep_file(options.output)


def _idle_patterns(job: _Job) -> list[str]:
    """Patterns of `keep` that match no weight."""
    names = job.source.weight_names()
    return [pattern for pattern in job.options.recipe.keep if not fnmatch.filter(names, pattern)]


def format_counts(matmuls: dict[str, str]) -> str:
    """Such as `38 int8, 4 float32`."""
    return ", ".join(f"{count} {format}" for format, count in Counter(matmuls.values()).most_common())


def state_bytes(bundle: Bundle) -> int:
    """Bytes of one stream's state."""
    return sum(4 * math.prod(entry.shape) for entry in bundle.manifest.state)
