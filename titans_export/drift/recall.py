"""What a stream still recalls at growing distance.

Of any model that reads tokens: a random string is told, text follows, and the string is told again. What the second
telling costs is set against what it costs after the same text where another string was told first, so that nothing but
what is recalled makes a difference. Of a model that was trained on the recall task (examples/recall_task.py):
pairs of a key and a value are told, filler follows, and then each key is asked.
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
SHORTEST, STEP = 64, 4  # the first distance, and how many times the one before each other is

# The recall task's alphabet: keys from 0, values, fillers, and the mark that an episode starts with.
KEYS, VALUES, FILLERS = 64, 64, 31
_FIRST_FILLER = KEYS + VALUES
_START = _FIRST_FILLER + FILLERS
PAIRS_VOCABULARY = _START + 1
PAIRS = 16  # told in an episode
STRING = 32  # tokens of a random string


@dataclass(frozen=True)
class Recall:
    """Recall over one distance: of strings the bits a token saves because it was told before, of pairs the part of the
    questions that was answered right.
    """

    distance: int
    trials: int
    base: float
    value: float


def distances(longest: int) -> list[int]:
    """Distances up to the longest one."""
    found, distance = [], SHORTEST
    while distance <= longest:
        found.append(distance)
        distance *= STEP
    return found


def task_of(vocab_size: int, tokenizer: Mapping[str, Any]) -> str:
    """The task that suits a model: pairs for the recall task's vocabulary where there is no text, else strings."""
    return "pairs" if vocab_size == PAIRS_VOCABULARY and tokenizer.get("kind") == "none" else "strings"


def measure_recall(
    base: titans_runtime.Session,
    others: Mapping[str, titans_runtime.Session],
    task: str,
    longest: int,
    filler: Tokens,
    *,
    trials: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Recall]]:
    """Recall of each other session beside the base's, by distance. Every trial is a fresh stream of all of them.

    `filler` is the text that lies between, of strings; the pairs' task has its own.
    """
    random = np.random.default_rng(seed)
    found: dict[str, list[Recall]] = {name: [] for name in others}
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(session.stream())) for session in (base, *others.values())]
        for distance in distances(longest):
            rows = []
            for _ in range(trials):
                ask = _pairs(distance, random) if task == "pairs" else _strings(distance, filler, random)
                rows.append([ask(stream) for stream in streams])
                progress(1)
            right, *values = np.mean(np.array(rows), 0).tolist()
            for name, value in zip(others, values, strict=True):
                found[name].append(Recall(distance, trials, right, value))
    return found


def _strings(distance: int, filler: Tokens, random: np.random.Generator) -> Callable[[titans_runtime.Stream], float]:
    """A trial: bits that a token of a string saves where the string was told before and not another one."""
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
    """Episodes of the recall task one after the other, cut to the length."""
    random = np.random.default_rng(seed)

    def parts() -> Iterator[Tokens]:
        count = 0
        while count < length:
            told, questions, _ = _episode(filler, random)
            yield from (told, questions)
            count += len(told) + len(questions)

    return np.concatenate([*parts(), np.empty(0, np.int32)])[:length]


def _episode(filler: int, random: np.random.Generator) -> tuple[Tokens, Tokens, Tokens]:
    """What is told, then keys and values in another order, and those values."""
    keys = random.permutation(KEYS)[:PAIRS]
    values = random.integers(KEYS, KEYS + VALUES, PAIRS)
    between = random.integers(_FIRST_FILLER, _START, filler)
    order = random.permutation(PAIRS)
    told = np.concatenate(([_START], np.stack((keys, values), 1).ravel(), between)).astype(np.int32)
    questions = np.stack((keys[order], values[order]), 1).ravel().astype(np.int32)
    return told, questions, values[order].astype(np.int32)


def _pairs(distance: int, random: np.random.Generator) -> Callable[[titans_runtime.Stream], float]:
    """A trial: the part of an episode's questions that is answered right."""
    told, questions, answers = _episode(distance, random)

    def ask(stream: titans_runtime.Stream) -> float:
        stream.reset()
        stream.feed(told, logits="none")
        outputs = stream.feed(questions)
        assert outputs is not None
        return float((outputs[::2].argmax(-1) == answers).mean())

    return ask
