"""The recall task: remember key-value pairs through filler text, then give each key's value.

An episode is a start mark, N pairs (key, value), filler tokens, and the same keys in another order, each followed by
its value. After a key in the last part, the next token should be its value. Every episode draws new pairs, so a model
must store them at inference; chance is 1 in 64. The start mark ends the validity of earlier pairs, so episodes may be
concatenated to an endless stream.

    token       0..63    64..127    128..158    159
    meaning     keys     values     filler      start mark
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KEYS = VALUES = 64
FILLERS = 31
FIRST_VALUE = KEYS
FIRST_FILLER = KEYS + VALUES
START = FIRST_FILLER + FILLERS
VOCAB_SIZE = START + 1
CHANCE = 1 / VALUES


class Episodes(NamedTuple):
    """Episodes of one kind, with their questions and answers."""

    tokens: NDArray[np.int64]  # (episodes, length)
    queries: NDArray[np.int64]  # (pairs,): positions of the queried keys; the model's output there is its answer
    answers: NDArray[np.int64]  # (episodes, pairs): right answers, equal to the tokens at queries + 1


def episode_length(pairs: int, filler: int) -> int:
    """Number of tokens per episode."""
    return 1 + 2 * pairs + filler + 2 * pairs


def make_episodes(count: int, pairs: int, filler: int, seed: int | Sequence[int], lead: int = 0) -> Episodes:
    """Makes `count` episodes of `pairs` pairs (at most 64), with `filler` tokens between pairs and questions.

    Equal arguments give equal episodes. lead: filler tokens before each episode's start mark.
    """
    random = np.random.default_rng(seed)
    keys = random.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :pairs]
    values = random.integers(FIRST_VALUE, FIRST_VALUE + VALUES, (count, pairs))
    padding = random.integers(FIRST_FILLER, FIRST_FILLER + FILLERS, (count, lead + filler))
    order = random.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)
    asked, answers = (np.take_along_axis(x, order, 1) for x in (keys, values))
    parts = (
        padding[:, :lead],
        np.full((count, 1), START),
        np.stack([keys, values], 2).reshape(count, -1),
        padding[:, lead:],
        np.stack([asked, answers], 2).reshape(count, -1),
    )
    queries = lead + 1 + 2 * pairs + filler + 2 * np.arange(pairs)
    return Episodes(np.concatenate(parts, 1), queries, answers)
