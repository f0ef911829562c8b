"""A bundle measured side by side: everything is compared with the golden logits first, then takes turns."""

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
from ..verify import Distance
from . import KINDS
from .models import Tokens
from .statistics import Speed, summarise
from .turns import take_turns
from .worker import Worker, WorkerError

_MODELS = "titans_export.bench.models"
# A token by token check over so many chunks: each of their folds, at a fraction of the golden stream's time.
_CHUNKS_ONE_BY_ONE = 4
# Each turn takes at least about this long, so that the clock and what wakes up first do not count.
_TURN_S = 0.2
_MOST_PASSES = 50


@dataclass(frozen=True)
class Contender:
    """Something that runs the model: its name, a line about it, and what makes it inside a worker."""

    name: str
    what: str
    target: str
    args: tuple[Any, ...]


@dataclass
class Result:
    """What became of a contender. `unavailable` says why it could not take part; speeds are there only where every
    contender passed.
    """

    contender: Contender
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
    """How much is measured: tokens of a pass of prefill and of decode, rounds, and threads of every contender."""

    prefill_tokens: int
    decode_tokens: int
    rounds: int
    threads: int

    @staticmethod
    def of(bundle: Bundle, prefill_tokens: int, decode_tokens: int, rounds: int, threads: int) -> Plan:
        """The plan with its tokens rounded up to whole calls and chunks, so that every pass does the same."""
        call = max(graph.tokens for graph in bundle.manifest.graphs)
        chunk = _chunk(bundle)
        return Plan(_round_up(prefill_tokens, call), _round_up(decode_tokens, chunk), rounds, threads)


def contenders(
    bundle: Path,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    checkpoint: Path | None = None,
    format: str = "titans",
    config: str | None = None,
) -> list[Contender]:
    """Who takes part, the one that the others are compared with first."""
    found = []
    if memory_kernel != "off":
        args = (bundle, device, backend, threads, "require")
        found.append(Contender("memory-kernel", "the runtime with its memory kernel", f"{_MODELS}:Runtime", args))
    args = (bundle, device, backend, threads, "off")
    what = "the runtime, the memory as standard ONNX operators"
    found.append(Contender("standard-operators", what, f"{_MODELS}:Runtime", args))
    if checkpoint is not None:
        for name, compiled in (("pytorch-eager", False), ("pytorch-compile", True)):
            what = "the checkpoint in PyTorch" + (" through torch.compile" if compiled else "")
            found.append(Contender(name, what, f"{_MODELS}:PyTorch", (checkpoint, format, threads, compiled, config)))
    return found


def compare(
    bundle: Bundle,
    taking_part: list[Contender],
    plan: Plan,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Prepares and checks all contenders; where all of those that can take part pass, measures them."""
    results = [Result(contender) for contender in taking_part]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            contender = result.contender
            say(f"preparing and checking {contender.name}: {contender.what}")
            began = time.monotonic()
            try:
                worker = stack.enter_context(Worker(contender.target, *contender.args, threads=plan.threads))
                result.notes = worker.call("prepare")
                result.setup_s = round(time.monotonic() - began, 2)
                _check(bundle, worker, result)
            except WorkerError as error:
                result.unavailable = str(error)
            else:
                workers[contender.name] = worker
        if all(result.passed for result in results if result.contender.name in workers):
            _measure(bundle, {r.contender.name: r for r in results}, workers, plan, say)
    return results


def ratios(results: list[Result]) -> dict[str, dict[str, float]]:
    """How many times as fast as each of the others the first one is that has a speed, by kind and other."""
    table: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        rates = {r.contender.name: r.speeds[kind].tokens_per_second for r in results if kind in r.speeds}
        first, *others = list(rates) or [""]
        if others:
            table[kind] = {other: rates[first] / rates[other] for other in others}
    return table


def _check(bundle: Bundle, worker: Worker, result: Result) -> None:
    """Compares with the golden logits, fed whole and, over the first chunks, token by token."""
    tokens, golden = bundle.golden()
    distance = Distance()
    for one_by_one, count in ((False, len(tokens)), (True, _CHUNKS_ONE_BY_ONE * _chunk(bundle))):
        logits = worker.call("all_logits", tokens[:count], one_by_one)
        distance.add(logits, golden[:count], 0, bundle.tolerance)
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
        say(f"measuring {kind}, {plan.rounds} rounds of {len(workers)} contenders, {count} tokens a pass")
        passes = {name: _passes(worker, kind, tokens) for name, worker in workers.items()}
        turns = take_turns(
            {name: partial(worker.call, kind, tokens, passes[name]) for name, worker in workers.items()}, plan.rounds
        )
        for name, own in turns.items():
            results[name].speeds[kind] = summarise(own, count)
    for name, worker in workers.items():
        memory = worker.call("memory")
        results[name].state_bytes, results[name].peak_rss_bytes = memory["state_bytes"], memory["peak_rss_bytes"]


def _passes(worker: Worker, kind: str, tokens: Tokens) -> int:
    """How many passes make a turn of this contender."""
    seconds: float = sum(worker.call(kind, tokens, 1)[0]) / 1e9
    return min(_MOST_PASSES, max(1, round(_TURN_S / max(seconds, 1e-9))))


def _chunk(bundle: Bundle) -> int:
    """Tokens of a chunk: the largest stride."""
    return max(graph.stride for graph in bundle.manifest.graphs)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
