"""Benchmarks many streams: prefill of one stream, decode of 1 to 64 streams, and the nodes that run.

    python -m benchmarks.streams                                      all models; minutes each
    python -m benchmarks.streams --model mac-bytes --count 1 --count 32
    python -m benchmarks.streams --older 123c1ac                      beside an older commit, which is set up first

The models are the examples mac-bytes and recall, the model of titans-pytorch's train_mac.py, and a MAC model of 100 M
parameters with random weights. The implementations are the runtime, with fast and with exact batches if the bundle's
graphs take many streams, the runtime of an older commit with the bundle that commit exports, and the same mathematics
through torch.compile with a batch of as many streams.

Before anything is timed, the logits of all implementations are compared after the same tokens. The exit code is 3 if
they differ by more than the bundle's tolerance. In each kind and number of streams, all are measured interleaved.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.models import CHECKPOINTS, export
from benchmarks.older import Older, prepare
from benchmarks.operator_times import profile
from benchmarks.report import RESULTS, ROOT, provenance, write
from benchmarks.titans_pytorch_model import CHECKED, provide, subject_in, weight_bytes
from benchmarks.titans_pytorch_model import FORMAT as TITANS_PYTORCH
from titans_export.bench.interleaved import interleave
from titans_export.bench.machine import QUIET, cores, others_busy
from titans_export.bench.models import PyTorch
from titans_export.bench.statistics import Passes, summarise
from titans_export.bench.worker import Worker, WorkerError
from titans_export.bundle import Bundle, read_bundle

COUNTS = (1, 4, 16, 32, 64)
WRONG = 3
FOLDER = ROOT / "build" / "bench"
ANY_COMMIT = Path(__file__).parent / "any_commit"
TURN_S, MOST_PASSES = 0.3, 50  # duration of a timed block, and its most passes
Make = Callable[[int], Worker]  # of a number of streams


@dataclass(frozen=True)
class Subject:
    """A measured model: its checkpoint, its bundle, and options of `export` beside the output."""

    name: str
    checkpoint: Path
    bundle: Bundle
    options: tuple[str, ...] = ()
    config: str | None = None


class TorchStreams(PyTorch):
    """Runs in a worker: a batch of streams through torch.compile."""

    def outputs(self, tokens: Any) -> Any:
        """The logits of the first stream after the last token, (1, vocab)."""
        self.reset()
        self.feed(tokens[:-4])
        for token in tokens[-4:]:
            last = self.step(int(token))
        return last[None]


def example(name: str) -> Subject:
    checkpoint = ROOT / CHECKPOINTS / name
    return Subject(name, checkpoint, read_bundle(ROOT / export(name)))


def train_mac() -> Subject:
    subject = subject_in(FOLDER)
    options = ("--format", TITANS_PYTORCH, "--config", subject.config, "--positions", str(CHECKED))
    return Subject("train_mac", subject.weights, provide(subject, anew=False), options, subject.config)


def mac_100m() -> Subject:
    """A MAC model of 100 M parameters with random weights."""
    import torch

    from titans_export.checkpoints.titans import save
    from titans_export.exporting import export_checkpoint
    from titans_export.model import MemoryConfig, ModelConfig, Titans

    checkpoint, bundle = FOLDER / "mac-100m", FOLDER / "mac-100m.titans"
    if not checkpoint.is_dir():
        memory = MemoryConfig(heads=10, head_dim=64, chunk=64)
        shape = {"dim": 640, "layers": 14, "hidden": 1_280, "attention_heads": 10, "window": 256, "persistent": 8}
        torch.manual_seed(0)
        save(Titans(ModelConfig("mac", 16_000, memory=memory, **shape)), checkpoint)  # type: ignore[arg-type]
    if not (bundle / "manifest.json").is_file():
        export_checkpoint(checkpoint, bundle, positions=CHECKED, progress=_say)
    return Subject("mac-100m", checkpoint, read_bundle(bundle), ("--positions", str(CHECKED)))


MODELS: dict[str, Callable[[], Subject]] = {
    "mac-bytes": partial(example, "mac-bytes"),
    "recall": partial(example, "recall"),
    "train_mac": train_mac,
    "mac-100m": mac_100m,
}


def implementations(subject: Subject, threads: int, older: Older | None, compiled: bool) -> dict[str, Make]:
    """Makers of workers by the implementation's name; the first is the one that ratios are of."""
    target = "bundle_streams:BundleStreams"

    def options(count: int, more: dict[str, Any]) -> dict[str, Any]:
        """A batch of several streams runs on a thread for each core, each with one thread."""
        return {"threads": threads} if count == 1 else {"threads": 1, "batch_threads": threads, **more}

    def runtime(bundle: Path, python: Path, count: int, **more: Any) -> Worker:
        arguments = (str(bundle), count, options(count, more))
        return Worker(target, *arguments, threads=threads, environment=(python, ANY_COMMIT))

    own = partial(runtime, subject.bundle.path, Path(sys.executable))
    found: dict[str, Make] = {"runtime": own}
    if subject.bundle.manifest.controls.slots is not None:
        found = {"runtime": partial(own, batch="fast"), "runtime, exact batches": own}
    if older is not None:
        bundle = FOLDER / f"{subject.name}-{older.commit[:7]}.titans"
        older.export(subject.checkpoint, bundle, subject.options)
        found[f"runtime at {older.commit[:7]}"] = partial(runtime, bundle, older.python)
    if compiled:
        described = subject.bundle.manifest.model

        def torch_compile(count: int) -> Worker:
            arguments = (subject.checkpoint, described, threads, True, subject.config, None, count)
            return Worker("benchmarks.streams:TorchStreams", *arguments, threads=threads)

        found["torch-compile"] = torch_compile
    return found


def measure(
    subject: Subject, makers: dict[str, Make], counts: tuple[int, ...], rounds: int, tokens: tuple[int, int]
) -> list[dict[str, Any]]:
    """One row per kind and number of streams: every implementation's speed, error and the ratios to the first."""
    rows = []
    vocabulary = subject.bundle.manifest.input.width
    prompt, single = (np.random.default_rng(0).integers(0, vocabulary, count, np.int32) for count in tokens)
    for count in counts:
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            entries: dict[str, dict[str, Any]] = {}
            expected = None
            for name, make in makers.items():
                _say(f"{subject.name}, {count} streams: preparing {name}")
                try:
                    worker = stack.enter_context(make(count))
                    notes = worker.call("prepare")
                    outputs = worker.call("outputs", prompt[: CHECKED + 3])
                except WorkerError as reason:
                    entries[name] = {"unavailable": str(reason)}
                    continue
                expected = outputs[0] if expected is None else expected
                error = float(np.abs(outputs - expected).max())
                entries[name] = {"notes": notes, "error": error, "passed": error <= subject.bundle.tolerance}
                workers[name] = worker
            kinds = (("prefill", prompt, 1), ("decode", single, count)) if count == 1 else (("decode", single, count),)
            for kind, given, streams in kinds:
                found = _interleaved(workers, kind, given, streams, rounds)
                rates = {name: speed["tokens_per_second"] for name, speed in found.items()}
                first = next(iter(rates))
                rows.append(
                    {
                        "kind": kind,
                        "streams": count,
                        "baselines": {name: {**entry, **found.get(name, {})} for name, entry in entries.items()},
                        "ratios": {name: rates[first] / rate for name, rate in rates.items() if name != first},
                    }
                )
    return rows


def _interleaved(
    workers: dict[str, Worker], kind: str, tokens: Any, streams: int, rounds: int
) -> dict[str, dict[str, Any]]:
    def passes(worker: Worker) -> int:
        seconds: float = sum(worker.call(kind, tokens, 1)[0]) / 1e9
        return min(MOST_PASSES, max(1, round(TURN_S / max(seconds, 1e-9))))

    chosen: dict[str, Callable[[], Passes]] = {
        name: partial(worker.call, kind, tokens, passes(worker)) for name, worker in workers.items()
    }
    return {
        name: dataclasses.asdict(summarise(own, len(tokens) * streams))
        for name, own in interleave(chosen, rounds).items()
    }


def reach(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios between rows of the runtime: decode of several streams over prefill, and over decode of one stream."""
    rate = {(row["kind"], row["streams"]): row["baselines"]["runtime"].get("tokens_per_second") for row in rows}
    found = {}
    for (kind, count), value in rate.items():
        for name, base in (("prefill", rate.get(("prefill", 1))), ("decode of one", rate.get(("decode", 1)))):
            if kind == "decode" and count > 1 and base and value:
                found[f"decode of {count} / {name}"] = value / base
    return found


def _say(text: str) -> None:
    click.echo(f"benchmarks: {text}", err=True)


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(tuple(MODELS)), help="Repeatable.  [default: all]")
@click.option(
    "--count", "counts", multiple=True, type=click.IntRange(1), help="Streams; repeatable.  [default: 1 to 64]"
)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of each.  [default: all cores]")
@click.option("--prompt", type=click.IntRange(CHECKED + 3), default=512, show_default=True, help="Tokens of a prefill.")
@click.option("--decode-tokens", type=click.IntRange(1), default=64, show_default=True, help="Steps of a pass.")
@click.option("--older", metavar="COMMIT", help="Measure this commit's runtime too.")
@click.option("--without-compile", is_flag=True, help="Leave out torch.compile.")
@click.option("--output-folder", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=False)
def main(
    models: tuple[str, ...],
    counts: tuple[int, ...],
    rounds: int,
    threads: int,
    prompt: int,
    decode_tokens: int,
    older: str | None,
    without_compile: bool,
    output_folder: Path,
) -> None:
    beside = prepare(older) if older else None
    threads = threads or cores()
    passed = True
    for name in models or tuple(MODELS):
        subject = MODELS[name]()
        busy = others_busy()
        if busy > QUIET:
            _say(f"other programs use {busy:.0%} of this machine: expect little of these numbers")
        makers = implementations(subject, threads, beside, not without_compile)
        rows = measure(subject, makers, tuple(counts) or COUNTS, rounds, (prompt, decode_tokens))
        result = {
            "benchmark": "streams",
            "name": name,
            "threads": threads,
            "prompt_tokens": prompt,
            "decode_tokens": decode_tokens,
            "rounds": rounds,
            "others_busy": busy,
            "weight_bytes_per_token": weight_bytes(subject.bundle),
            "rows": rows,
            "reach": reach(rows),
            "profile": profile(subject.bundle, threads, prompt),
            **provenance(),
        }
        write(output_folder / f"cpu-streams-{name}-{result['date']}.json", result)
        for row in rows:
            rates = ", ".join(f"{each:.2f} times {other}" for other, each in row["ratios"].items())
            speed = row["baselines"]["runtime"].get("tokens_per_second", 0.0)
            click.echo(f"{name}, {row['kind']} of {row['streams']}: {speed:,.0f} tokens/s; {rates}")
        wrong = [f"{row['kind']} of {row['streams']}, {each}" for row in rows
                 for each, entry in row["baselines"].items() if entry.get("passed") is False]  # fmt: skip
        if wrong:
            passed = False
            click.echo(f"[streams] outputs differ: {'; '.join(wrong)}", err=True)
    if not passed:
        sys.exit(WRONG)


if __name__ == "__main__":
    main()
