"""Recall of earlier tokens over growing distances.

Task "strings", for any model that reads tokens: a random string, text, and the same string again. Recall is the number
of bits that its second occurrence costs less than after the same text with another string first. Task "pairs", for
models trained on the recall task (examples/recall_task.py): pairs of a key and a value, filler, then each key as a
question. Recall is the fraction of right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import titans_runtime

Tokens = NDArray[np.int32]
TASKS = ("strings", "pairs")
SHORTEST, STEP = 64, 4  # the first distance, and the factor from one to the next

# The recall task's alphabet: keys from 0, values, fillers, and the token that starts an episode.
KEYS, VALUES, FILLERS = 64, 64, 31
_FIRST_FILLER = KEYS + VALUES
_START = _FIRST_FILLER + FILLERS
PAIRS_VOCABULARY = _START + 1
PAIRS = 16  # told in an episode
STRING = 32  # tokens of a random string


@dataclass(frozen=True)
class Recall:
    """Recall over one distance: bits saved per token for strings, the fraction of right answers for pairs."""

    distance: int
    trials: int
    reference: float
    value: float


def distances(longest: int) -> list[int]:
    """Distances up to the longest one."""
    found, distance = [], SHORTEST
    while distance <= longest:
        found.append(distance)
        distance *= STEP
    return found


def task_of(vocab_size: int, tokenizer: Mapping[str, Any]) -> str:
    """The task for a model: pairs if it has the recall task's vocabulary and no tokenizer, else strings."""
    return "pairs" if vocab_size == PAIRS_VOCABULARY and tokenizer.get("kind") == "none" else "strings"


def measure_recall(
    reference: titans_runtime.Session,
    candidates: Mapping[str, titans_runtime.Session],
    task: str,
    longest: int,
    filler: Tokens,
    *,
    trials: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Recall]]:
    """Recall of each candidate and of the reference, by distance. Every trial begins with fresh streams.

    `filler` (T,) is the text between strings; the pairs task has its own.
    """
    random = np.random.default_rng(seed)
    found: dict[str, list[Recall]] = {name: [] for name in candidates}
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(session.stream())) for session in (reference, *candidates.values())]
        for distance in distances(longest):
            rows = []
            for _ in range(trials):
                ask = _pairs(distance, random) if task == "pairs" else _strings(distance, filler, random)
                rows.append([ask(stream) for stream in streams])
                progress(1)
            reference_value, *values = np.mean(np.array(rows), 0).tolist()
            for name, value in zip(candidates, values, strict=True):
                found[name].append(Recall(distance, trials, reference_value, value))
    return found


def _strings(distance: int, filler: Tokens, random: np.random.Generator) -> Callable[[titans_runtime.Stream], float]:
    """A trial: bits per token that a string costs less if the same string came before, not another one."""
    letters = np.unique(filler)
    string, another = random.choice(letters, (2, STRING)).astype(np.int32)
    start = int(random.integers(max(1, len(filler) - distance - SHORTEST + 1)))
    text = np.resize(filler[start:], SHORTEST + distance)
    lead, between = text[:SHORTEST], text[SHORTEST:]

    def ask(stream: titans_runtime.Stream) -> float:
        costs = []
        for told in (string, another):
            stream.reset()
            scores = stream.score(np.concatenate((lead, told, between, string)))
            costs.append(-float(scores[-STRING:].astype(np.float64).mean()) / math.log(2))
        return costs[1] - costs[0]

    return ask


def episodes(length: int, filler: int, seed: int) -> Tokens:
    """Consecutive episodes of the recall task, cut to the length."""
    random = np.random.default_rng(seed)

    def parts() -> Iterator[Tokens]:
        count = 0
        while count < length:
            told, questions, _ = _episode(filler, random)
            yield from (told, questions)
            count += len(told) + len(questions)

    return np.concatenate([*parts(), np.empty(0, np.int32)])[:length]


def _episode(filler: int, random: np.random.Generator) -> tuple[Tokens, Tokens, Tokens]:
    """The told part, then keys and values in another order, and those values."""
    keys = random.permutation(KEYS)[:PAIRS]
    values = random.integers(KEYS, KEYS + VALUES, PAIRS)
    between = random.integers(_FIRST_FILLER, _START, filler)
    order = random.permutation(PAIRS)
    told = np.concatenate(([_START], np.stack((keys, values), 1).ravel(), between)).astype(np.int32)
    questions = np.stack((keys[order], values[order]), 1).ravel().astype(np.int32)
    return told, questions, values[order].astype(np.int32)


def _pairs(distance: int, random: np.random.Generator) -> Callable[[titans_runtime.Stream], float]:
    """A trial: the fraction of an episode's questions that is answered right."""
    told, questions, answers = _episode(distance, random)

    def ask(stream: titans_runtime.Stream) -> float:
        stream.reset()
        stream.feed(told, outputs="none")
        outputs = stream.feed(questions)
        assert outputs is not None
        return float((outputs[::2].argmax(-1) == answers).mean())

    return ask
