"""Generation against numpy, and where it stops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from synthetic import Reference, Weights

import titans_runtime as rt

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def stream(session: rt.Session) -> rt.Stream:
    stream = session.stream()
    stream.feed(PROMPT, outputs="none")
    return stream


def greedy(weights: Weights, count: int) -> list[int]:
    reference = Reference(weights)
    logits = reference.feed(PROMPT)[-1]
    tokens = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = reference.step(tokens[-1])
    return tokens


def test_greedy(stream: rt.Stream, weights: Weights) -> None:
    assert list(stream.generate(max_tokens=20, temperature=0)) == greedy(weights, 20)
    assert stream.position == len(PROMPT) + 20


def test_the_stream_has_consumed_exactly_what_was_yielded(stream: rt.Stream) -> None:
    for count, _ in enumerate(stream.generate(max_tokens=7), 1):
        assert stream.position == len(PROMPT) + count


def test_the_seed_decides(stream: rt.Stream) -> None:
    runs = [list(stream.fork().generate(max_tokens=30, temperature=3.0, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_run_can_be_continued_after_max_tokens(stream: rt.Stream, weights: Weights) -> None:
    parts = [list(stream.generate(max_tokens=10, temperature=0)) for _ in range(2)]
    assert parts[0] + parts[1] == greedy(weights, 20)


def test_no_limit(stream: rt.Stream) -> None:
    assert len(list(itertools.islice(stream.generate(max_tokens=None), 100))) == 100


def test_top_k_1_is_greedy(stream: rt.Stream, weights: Weights) -> None:
    assert list(stream.generate(max_tokens=10, top_k=1, seed=9)) == greedy(weights, 10)


def test_a_stop_token_is_neither_yielded_nor_consumed(stream: rt.Stream, weights: Weights) -> None:
    tokens = greedy(weights, 20)
    stop = tokens[6]
    first = tokens.index(stop)
    assert list(stream.generate(temperature=0, stop=[stop])) == tokens[:first]
    assert stream.position == len(PROMPT) + first


@pytest.mark.parametrize("kind", [list, bytes, np.array])
def test_a_stop_sequence_is_yielded_and_consumed(stream: rt.Stream, weights: Weights, kind: Any) -> None:
    tokens = greedy(weights, 20)
    end = next(i for i in range(2, 20) if tokens[i - 2 : i] == tokens[4:6])
    assert list(stream.generate(temperature=0, stop=[[15, 15, 15, 15], kind(tokens[4:6])])) == tokens[:end]
    assert stream.position == len(PROMPT) + end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"stop": "ab"}, "list"),
        ({"stop": [b""]}, "empty"),
    ],
    ids=str,
)
def test_wrong_options(stream: rt.Stream, options: dict[str, Any], message: str) -> None:
    with pytest.raises(rt.Error, match=message) as caught:
        stream.generate(**options)
    assert caught.value.status == 2


def test_a_fresh_stream_cannot_generate(session: rt.Session) -> None:
    with pytest.raises(rt.Error, match="consumed a token"):
        session.stream().generate()


def test_a_closed_stream_ends_in_an_error(stream: rt.Stream) -> None:
    generation = stream.generate()
    next(generation)
    stream.close()
    with pytest.raises(rt.Error, match="closed"):
        next(generation)
