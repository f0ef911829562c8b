"""Measures the accuracy and speed of each recipe against float32, over long streams.

    python -m benchmarks.quantization --calibration part.txt --text book.txt
    python -m benchmarks.quantization --calibration part.txt --text book.txt --model mac-bytes --recipe int8

For each model, the calibration text yields one bundle per recipe. All bundles read the same stream as the float32
bundle (`titans_export.drift`). Then recall is measured, and interleaved speeds of the engines of
`titans-export build --target cpu`. The recall model has its own data, drawn from seeds. A model with random weights is
only timed.

Results stay in the work folder, drift and speeds in separate files; --again measures them anew. Speeds can therefore be
measured later, on an idle machine. A result file contains all models measured so far.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.report import RESULTS, ROOT, provenance, rounded, write
from titans_export.bench import KINDS
from titans_export.bench.comparison import Plan
from titans_export.bench.interleaved import interleave
from titans_export.bench.machine import QUIET, cores, others_busy
from titans_export.bench.statistics import summarise
from titans_export.bench.worker import Worker, WorkerError, explain
from titans_export.bundle import Bundle, read_bundle
from titans_export.drift import Comparison, compare, recall
from titans_export.drift.memory import worst
from titans_export.engines.build import build_engine
from titans_export.engines.plan import Request
from titans_export.errors import TitansError

if TYPE_CHECKING:
    from titans_calibration.recipe import Recipe
    from titans_export.drift.metrics import Drift, Tokens
    from titans_runtime import Session

WORK = ROOT / "build" / "quantization"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
FLOAT32 = "float32"
EPISODE_FILLER = 128  # filler tokens of the recall task's episodes, for calibration and the long stream
CALIBRATION_SEED, STREAM_SEED = 11, 12
MEMORY_WINDOWS = 8  # last windows over which the memory distance is reported

Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of the campaign. tokens: length of its stream, 0: only timed. longest_recall: 0: no recall."""

    name: str
    source: Path
    tokens: int
    format: str = "titans"
    config: str | None = None
    stream_length: int | None = None
    longest_recall: int = 0
    recipes: tuple[str, ...] | None = None  # None: all
    positions: int = 1024  # positions of its export that are compared with PyTorch


MODELS = (
    Model("mac-bytes", CHECKPOINTS / "mac-bytes", 2_000_000, longest_recall=1024),
    Model("recall", CHECKPOINTS / "recall", 262_144, longest_recall=16_384),
    # Chaotic over long streams (docs/titans-pytorch.md), so it runs as 64 new streams.
    Model(
        "titans-pytorch-bytes",
        CHECKPOINTS / "titans-pytorch-bytes" / "model.safetensors",
        64 * 4096,
        format="titans-pytorch",
        config=str(CHECKPOINTS / "titans-pytorch-bytes" / "model.json"),
        stream_length=4096,
    ),
    Model(
        "train-mac",
        ROOT / "build" / "bench" / "train-mac.pt",
        0,
        format="titans-pytorch",
        config="train_mac",
        recipes=("int8-weight-only", "int8", "int4-weight-only"),
        positions=192,  # with random weights, float32 soon diverges from float64
    ),
)


@dataclass(frozen=True)
class Settings:
    """Settings of all models."""

    calibration: Path
    text: Path
    calibration_tokens: int
    tokens: int | None
    window: int
    rounds: int
    prefill_tokens: int
    decode_tokens: int
    threads: int
    seed: int
    work: Path


def measure(model: Model, recipes: Sequence[str], settings: Settings, again: str | None) -> Result:
    """All results of one model. Measures those that are missing or requested by `again`."""
    bundle = _export(model, settings)
    taking_part, entries = {FLOAT32: bundle.path}, {}
    for name in recipes:
        entries[name] = _quantise(model, bundle, name, settings)
        if entries[name]["unavailable"] is None:
            taking_part[name] = settings.work / f"{model.name}.{name}.titans"
    entries = {FLOAT32: {"name": FLOAT32, "unavailable": None}, **entries}
    parts = []
    for kind, measured in (("drift", _compare), ("times", _time)):
        if kind == "drift" and not model.tokens:
            continue
        path = settings.work / f"{model.name}.{kind}.json"
        if again in (kind, "all") or not path.is_file():
            write(path, {**measured(model, bundle, taking_part, settings), **provenance()})
        part = json.loads(path.read_text(encoding="utf-8"))
        if part["recipes"].keys() != taking_part.keys():
            raise click.ClickException(
                f"{path} has other recipes: expected {', '.join(taking_part)}, got {', '.join(part['recipes'])}. "
                f"Fix: measure them with --again {kind}"
            )
        for name, values in part.pop("recipes").items():
            entries[name] |= values
        parts.append(part)
    result: Result = {"name": model.name, "parameters": bundle.manifest.model.parameters}
    if not model.tokens:
        result |= {"text": None, "tokens": 0, "stream_length": None, "window": settings.window, "seed": settings.seed}
    for part in parts:  # common fields, such as the commit, come from the times
        result |= part
    return result | {"drift_commit": parts[0]["commit"], "recipes": list(entries.values())}


def _export(model: Model, settings: Settings) -> Bundle:
    """The float32 bundle; exported if missing."""
    path = settings.work / f"{model.name}.titans"
    if not (path / "manifest.json").is_file():
        from titans_export.exporting import export_checkpoint

        if not model.source.exists():
            fix = "make it with python -m benchmarks.titans_pytorch_model"
            raise click.ClickException(f"no such file: {model.source}. Fix: {fix}")
        options: dict[str, Any] = {"format": model.format, "config": model.config, "positions": model.positions}
        path.parent.mkdir(parents=True, exist_ok=True)
        export_checkpoint(model.source, path, progress=_say, **options)
    return read_bundle(path)


def _quantise(model: Model, bundle: Bundle, name: str, settings: Settings) -> Result:
    """Report of quantising to a recipe. The bundle is in the work folder; made if missing."""
    from titans_calibration.options import QuantizeOptions
    from titans_calibration.quantize import quantize_bundle
    from titans_calibration.recipe import load_recipe

    path, kept = (settings.work / f"{model.name}.{name}.{suffix}" for suffix in ("titans", "quantize.json"))
    recipe: Recipe = load_recipe(name)
    made: Result = {}
    try:
        if not (path.is_dir() and kept.is_file()):
            _say(f"{model.name}: quantising to {name}")
            options = QuantizeOptions(
                bundle.path,
                path,
                recipe,
                (_calibration(model, bundle, settings),),
                tokens=settings.calibration_tokens,
                seed=settings.seed,
                overwrite=True,
            )
            report = quantize_bundle(options, progress=_say)
            keys = ("max_abs_error", "tolerance", "weights_bytes", "float32_weights_bytes", "tokens", "seconds")
            values = {key: value for key, value in dataclasses.asdict(report).items() if key in keys}
            counts: dict[str, int] = {}
            for format in report.matmuls.values():
                counts[format] = counts.get(format, 0) + 1
            kept.write_text(json.dumps(rounded(values | {"matmuls": counts})), encoding="utf-8")
        made = json.loads(kept.read_text(encoding="utf-8"))
        _open(path, settings).close()
    except Exception as error:  # a failing recipe is reported and does not stop the others
        if not isinstance(error, TitansError) and type(error).__module__.partition(".")[0] != "titans_runtime":
            raise
        return {"name": name, "unavailable": explain(error), "quantize": made or None}
    return {"name": name, "unavailable": None, "quantize": made}


def _calibration(model: Model, bundle: Bundle, settings: Settings) -> Path:
    """Calibration data of a model: the text, or episodes for the recall task's model."""
    if bundle.manifest.tokenizer.kind != "none":
        return settings.calibration
    path = settings.work / f"{model.name}.calibration.npz"
    np.savez(path, episodes=recall.episodes(settings.calibration_tokens, EPISODE_FILLER, CALIBRATION_SEED))
    return path


def _stream(model: Model, bundle: Bundle, settings: Settings) -> Tokens:
    """The tokens that all bundles of a model read. Raises ClickException if there are too few."""
    count = min(settings.tokens or model.tokens, model.tokens)
    if bundle.manifest.tokenizer.kind == "none":
        return recall.episodes(count, EPISODE_FILLER, STREAM_SEED)
    from titans_export.drift.measure import read_text

    tokens: Tokens = read_text(bundle, settings.text, count).values
    if len(tokens) < count:
        raise click.ClickException(
            f"{settings.text} is too short: expected {count:,} tokens, got {len(tokens):,}. Fix: give a longer text"
        )
    return tokens


def _text_of(bundle: Bundle, settings: Settings) -> str:
    if bundle.manifest.tokenizer.kind == "none":
        return "episodes of the recall task"
    return settings.text.name


def _open(path: Path, settings: Settings) -> Session:
    """Opens the plain graphs, to measure the recipe itself. Speeds are measured with engines."""
    import titans_runtime

    return titans_runtime.Session(path, threads=settings.threads, engine="none")


def _compare(model: Model, bundle: Bundle, taking_part: dict[str, Path], settings: Settings) -> Result:
    """Drift and recall of all bundles, in one pass."""
    tokens = _stream(model, bundle, settings)
    found: Result = {
        "text": _text_of(bundle, settings),
        "tokens": len(tokens),
        "stream_length": model.stream_length,
        "window": settings.window,
        "seed": settings.seed,
    }
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(_open(path, settings)) for name, path in taking_part.items()}
        base = sessions.pop(FLOAT32)
        others = sessions or {FLOAT32: base}
        _say(f"{model.name}: {len(tokens):,} tokens through {1 + len(sessions)} bundles")
        with click.progressbar(length=len(tokens), label="comparing") as bar:
            compared = compare(
                base, others, tokens, window=settings.window, stream_length=model.stream_length, progress=bar.update
            )
        entries = {FLOAT32: _of_float32(compared)} | {name: _of_drift(compared.drifts[name]) for name in sessions}
        if not model.longest_recall:
            return found | {"recipes": entries}
        task = recall.task_of(base.vocab_size, base.info["tokenizer"])
        _say(f"{model.name}: recall ({task}) over up to {model.longest_recall:,} tokens")
        measured = recall.measure_recall(base, others, task, model.longest_recall, tokens, seed=settings.seed)
        for name, rows in measured.items():
            values = [{"distance": row.distance, "value": row.value} for row in rows]
            bases = [{"distance": row.distance, "value": row.reference} for row in rows]
            entries[FLOAT32]["recall"] = {"task": task, "distances": bases}
            if name in sessions:
                entries[name]["recall"] = {"task": task, "distances": values}
    return found | {"recipes": entries}


def _of_float32(found: Comparison) -> Result:
    drift = next(iter(found.drifts.values()))
    windows = [{"end": window.end, "bits": window.reference_bits} for window in drift.windows]
    return {"bits_per_token": drift.reference_bits, "windows": windows}


def _of_drift(drift: Drift) -> Result:
    return {
        "bits_per_token": drift.bits,
        "bits_difference": drift.bits_difference,
        "worst_window": max((window.bits_difference or 0 for window in drift.windows), default=None),
        "kl_mean": drift.kl_mean,
        "kl_max": drift.kl_max,
        "top1_agreement": drift.top1_agreement,
        "mean_abs_error": drift.mean_abs_error,
        "max_abs_error": drift.max_abs_error,
        "memory": worst(drift.memory, MEMORY_WINDOWS),
        "windows": [
            {"end": window.end, "bits": window.bits, "difference": window.bits_difference, "kl": window.kl_mean}
            for window in drift.windows
        ],
    }


def _time(model: Model, bundle: Bundle, taking_part: dict[str, Path], settings: Settings) -> Result:
    """Bytes of all bundles, and their interleaved speeds."""
    busy = others_busy()
    if busy > QUIET:
        _say(f"others keep {busy:.0%} of this machine busy: expect little of the speeds")
    entries: dict[str, Result] = {}
    built: dict[str, Path] = {}
    for name, path in taking_part.items():
        manifest = read_bundle(path).manifest
        built[name] = settings.work / f"{model.name}.{name}.cpu.titans"
        build_engine(path, Request("cpu"), output=built[name], overwrite=True)
        with _open(path, settings) as session, session.stream() as stream:
            entries[name] = {
                "weights_bytes": manifest.files[manifest.weights.file].bytes,
                "state_bytes": stream.state_bytes,
            }
    plan = Plan.of(bundle, settings.prefill_tokens, settings.decode_tokens, settings.rounds, settings.threads)
    with ExitStack() as stack:
        workers = {}
        for name, path in built.items():
            try:
                arguments = (path, "cpu", None, settings.threads, "auto")
                target = "titans_export.bench.models:Runtime"
                worker = stack.enter_context(Worker(target, *arguments, threads=settings.threads))
                entries[name]["notes"] = worker.call("prepare")
                worker.call("start")
                workers[name] = worker
            except WorkerError as error:
                entries[name]["untimed"] = str(error)
        for kind, count in zip(KINDS, (plan.prefill_tokens, plan.decode_tokens), strict=True):
            _say(f"{model.name}: {kind}, {plan.rounds} rounds of {len(workers)} bundles")
            tokens = np.random.default_rng(0).integers(0, bundle.manifest.input.width, count, np.int32)
            rounds = interleave(
                {name: partial(worker.call, kind, tokens, 1) for name, worker in workers.items()}, plan.rounds
            )
            for name, own in rounds.items():
                entries[name][kind] = dataclasses.asdict(summarise(own, count))
    return {
        "threads": settings.threads,
        "others_busy": busy,
        "prefill_tokens": settings.prefill_tokens,
        "decode_tokens": settings.decode_tokens,
        "recipes": entries,
    }


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--model", "models", multiple=True, type=click.Choice([model.name for model in MODELS]))
@click.option(
    "--recipe", "recipes", multiple=True, help="Built-in recipe or FILE.toml.  [default: every recipe for CPUs]"
)
@click.option("--tokens", type=click.IntRange(1), help="Maximum tokens per stream.  [default: the model's own]")
@click.option("--calibration-tokens", type=click.IntRange(1), default=1 << 15, show_default=True)
@click.option("--window", type=click.IntRange(1), default=1 << 15, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--prefill-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads.  [default: all cores]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=WORK, show_default=False)
@click.option(
    "--again", type=click.Choice(["drift", "times", "all"]), help="Repeat finished measurements; bundles are kept."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Result file to write.  [default: in benchmarks/results]",
)
def main(
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    again: str | None,
    output: Path | None,
    threads: int,
    **given: Any,
) -> None:
    settings = Settings(threads=threads or cores(), **given)
    settings.work.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        part = settings.work / f"{model.name}.json"
        if (models and model.name not in models) or (part.is_file() and not again):
            continue
        write(part, measure(model, recipes or model.recipes or cpu_recipes(), settings, again))
        _say(f"{model.name}: measured")
    parts = [settings.work / f"{model.name}.json" for model in MODELS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in parts if path.is_file()]
    if not found:
        raise click.ClickException("nothing was measured")
    source = provenance()
    result = {"benchmark": "quantization", "models": found, **source}
    write(output or RESULTS / f"cpu-quantization-{source['date']}.json", result)


def cpu_recipes() -> list[str]:
    """The built-in recipes that a CPU can run: those without fp8 matmuls."""
    from titans_calibration.recipe import load_recipe, recipe_names

    return [name for name in recipe_names() if load_recipe(name).weights.format != "fp8"]


if __name__ == "__main__":
    main()
