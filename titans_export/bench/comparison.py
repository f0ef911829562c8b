"""Measures a bundle against baselines: all are checked with the golden outputs, then measured interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..manifest import Model
from ..verifying import Distance
from . import KINDS
from .interleaved import interleave
from .models import Tokens
from .statistics import Speed, summarise
from .worker import Worker, WorkerError

_MODELS = "titans_export.bench.models"
# The check token by token covers this many chunks: every kind of chunk update in a fraction of the time.
_CHUNKS_ONE_BY_ONE = 4
# Minimum duration of the passes in a round, so that clock resolution and wake-up do not matter.
_ROUND_S = 0.2
_CHECKED_BYTES = 128 << 20  # most outputs of a check
_MOST_PASSES = 50


@dataclass(frozen=True)
class Baseline:
    """A way to run the model: name, description, and the callable that makes it in a worker."""

    name: str
    what: str
    target: str
    args: tuple[Any, ...]


@dataclass
class Result:
    """The result of a baseline. `unavailable` is the reason if it cannot run. Speeds exist only if all passed."""

    baseline: Baseline
    unavailable: str | None = None
    passed: bool | None = None
    max_abs_error: float | None = None
    first_bad_position: int | None = None
    setup_s: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    state_bytes: int | None = None
    peak_rss_bytes: int | None = None
    speeds: dict[str, Speed] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Tokens per prefill and decode pass, rounds, and threads of every baseline."""

    prefill_tokens: int
    decode_tokens: int
    rounds: int
    threads: int

    @staticmethod
    def of(bundle: Bundle, prefill_tokens: int, decode_tokens: int, rounds: int, threads: int) -> Plan:
        """The plan with tokens rounded up to whole calls and chunks, so that every pass is the same work."""
        call = max(graph.tokens for graph in bundle.manifest.graphs)
        chunk = _chunk(bundle)
        return Plan(_round_up(prefill_tokens, call), _round_up(decode_tokens, chunk), rounds, threads)


def baselines(
    bundle: Path,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    checkpoint: Path | None = None,
    described: Model | None = None,
    config: str | None = None,
    weights: str | None = None,
) -> list[Baseline]:
    """The baselines; ratios are relative to the first."""
    found = []
    if memory_kernel != "off":
        args = (bundle, device, backend, threads, "require")
        found.append(Baseline("memory-kernel", "the runtime with its memory kernel", f"{_MODELS}:Runtime", args))
    args = (bundle, device, backend, threads, "off")
    what = "the runtime, the memory as standard ONNX operators"
    found.append(Baseline("standard-operators", what, f"{_MODELS}:Runtime", args))
    if checkpoint is not None:
        for name, compiled in (("pytorch-eager", False), ("pytorch-compile", True)):
            what = "the checkpoint in PyTorch" + (" through torch.compile" if compiled else "")
            options = (checkpoint, described, threads, compiled, config, weights)
            found.append(Baseline(name, what, f"{_MODELS}:PyTorch", options))
    return found


def compare(
    bundle: Bundle,
    chosen: list[Baseline],
    plan: Plan,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Prepares and checks all baselines, and measures them if all available ones pass."""
    results = [Result(baseline) for baseline in chosen]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            baseline = result.baseline
            say(f"preparing and checking {baseline.name}: {baseline.what}")
            began = time.monotonic()
            try:
                worker = stack.enter_context(Worker(baseline.target, *baseline.args, threads=plan.threads))
                result.notes = worker.call("prepare")
                result.setup_s = round(time.monotonic() - began, 2)
                _check(bundle, worker, result)
            except WorkerError as error:
                result.unavailable = str(error)
            else:
                workers[baseline.name] = worker
        if all(result.passed for result in results if result.baseline.name in workers):
            _measure(bundle, {r.baseline.name: r for r in results}, workers, plan, say)
    return results


def ratios(results: list[Result]) -> dict[str, dict[str, float]]:
    """Speed of the first measured baseline divided by that of each other one, by kind and name."""
    table: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        rates = {r.baseline.name: r.speeds[kind].tokens_per_second for r in results if kind in r.speeds}
        first, *others = list(rates) or [""]
        if others:
            table[kind] = {other: rates[first] / rates[other] for other in others}
    return table


def _check(bundle: Bundle, worker: Worker, result: Result) -> None:
    """Compares with the golden outputs: fed whole and, over the first chunks, token by token."""
    golden = bundle.golden()
    distance = Distance()
    few = _CHUNKS_ONE_BY_ONE * _chunk(bundle)
    for one_by_one, count in ((False, max(few, _CHECKED_BYTES // (4 * golden.size))), (True, few)):
        logits = worker.call("all_logits", golden.inputs[:count], one_by_one)
        distance.add(golden.errors(logits, 0), 0, bundle.limits().at(0, len(logits)))
    result.max_abs_error, result.first_bad_position = distance.max_abs_error, distance.first_bad_position
    result.passed = distance.first_bad_position is None


def _measure(
    bundle: Bundle, results: dict[str, Result], workers: dict[str, Worker], plan: Plan, say: Callable[[str], None]
) -> None:
    vocabulary = bundle.manifest.input.width
    for worker in workers.values():
        worker.call("start")
    for kind, count in zip(KINDS, (plan.prefill_tokens, plan.decode_tokens), strict=True):
        tokens: Tokens = np.random.default_rng(0).integers(0, vocabulary, count, np.int32)
        say(f"measuring {kind}, {plan.rounds} rounds of {len(workers)} baselines, {count} tokens per pass")
        passes = {name: _passes(worker, kind, tokens) for name, worker in workers.items()}
        rounds = interleave(
            {name: partial(worker.call, kind, tokens, passes[name]) for name, worker in workers.items()}, plan.rounds
        )
        for name, own in rounds.items():
            results[name].speeds[kind] = summarise(own, count)
    for name, worker in workers.items():
        memory = worker.call("memory")
        results[name].state_bytes, results[name].peak_rss_bytes = memory["state_bytes"], memory["peak_rss_bytes"]


def _passes(worker: Worker, kind: str, tokens: Tokens) -> int:
    """Passes of this baseline per round."""
    seconds: float = sum(worker.call(kind, tokens, 1)[0]) / 1e9
    return min(_MOST_PASSES, max(1, round(_ROUND_S / max(seconds, 1e-9))))


def _chunk(bundle: Bundle) -> int:
    """Tokens of a chunk: the largest stride."""
    return max(graph.stride for graph in bundle.manifest.graphs)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
