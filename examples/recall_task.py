"""The recall task: remember pairs of a key and a value through filler text, then say each key's value.

An episode is a start mark, N pairs (key, value), filler tokens, and the same keys in another order, each followed by
its value. After a key of the last part, the next token should be its value. Keys and values are drawn anew for every
episode, so only a model that stores the pairs while it runs can know them: chance is 1 in 64. The start mark says that
the pairs of an earlier episode no longer hold, so episodes may follow each other in one endless stream.

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
    """Episodes of one kind, and where and what their questions are."""

    tokens: NDArray[np.int64]  # (episodes, length)
    queries: NDArray[np.int64]  # (pairs,): places of the keys that are asked; the model's output there is its answer
    answers: NDArray[np.int64]  # (episodes, pairs): the right answers, which are also the tokens at queries + 1


def episode_length(pairs: int, filler: int) -> int:
    """Tokens of an episode."""
    return 1 + 2 * pairs + filler + 2 * pairs


def make_episodes(count: int, pairs: int, filler: int, seed: int | Sequence[int], lead: int = 0) -> Episodes:
    """`count` episodes of `pairs` pairs (at most 64) with `filler` tokens between the pairs and the questions.

    The same arguments give the same episodes. lead: filler tokens in front of each episode's start mark.
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
