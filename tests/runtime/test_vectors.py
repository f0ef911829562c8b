"""Streams of vectors against the same model in numpy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import MEMORY, PERIOD, PERIODIC_GRAPHS, Reference, Weights, write_bundle

import titans_runtime as rt

SIZE, OUTPUTS = 12, 5
INVALID_ARGUMENT = 2
FORM = re.compile(r"\[[^\]]+\] .+\. Fix: .+ \(TITANS-E\d{4}\)")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_stream.py
VECTORS = np.random.default_rng(2).normal(size=(41, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Weights:
    return Weights.random(vocab=SIZE, outputs=OUTPUTS)


@pytest.fixture(scope="module")
def vector_bundle(tmp_path_factory: pytest.TempPathFactory, model: Weights) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "vectors.titans"
    return write_bundle(folder, model, PERIODIC_GRAPHS, period=PERIOD, vectors=True)


@pytest.fixture(scope="module")
def vector_session(vector_bundle: Path) -> rt.Session:
    return rt.Session(vector_bundle, threads=1)


@pytest.fixture(scope="module")
def expected(model: Weights) -> Any:
    return Reference(model, period=PERIOD).feed(VECTORS)


def close(got: Any, right: Any) -> None:
    assert got.dtype == np.float32 and got.shape == right.shape
    np.testing.assert_allclose(got, right, **TOLERANCE)


def test_what_the_session_says(vector_session: rt.Session, session: rt.Session) -> None:
    assert (vector_session.input_kind, vector_session.input_size, vector_session.output_size) == (
        "vectors",
        SIZE,
        OUTPUTS,
    )
    assert vector_session.vocab_size == 0 and vector_session.info["vocab_size"] is None
    assert vector_session.info["input"] == {"kind": "vectors", "name": "x", "dtype": "float32", "size": SIZE}
    assert vector_session.info["output"] == {"kind": "vectors", "name": "y", "dtype": "float32", "size": OUTPUTS}
    assert (session.input_kind, session.input_size, session.output_size, session.vocab_size) == ("tokens", 16, 16, 16)
    assert session.info["input"] == {"kind": "tokens", "name": "tokens", "dtype": "int64", "size": 16}
    assert session.info["output"]["kind"] == "logits"


@pytest.mark.parametrize("cuts", [[41], [1] * 41, [3, 5, 8, 25], [0, 7, 0, 34]], ids=lambda cuts: str(cuts[:4]))
def test_any_cut_gives_the_same_outputs(vector_session: rt.Session, cuts: list[int], expected: Any) -> None:
    stream = vector_session.stream()
    parts = np.split(VECTORS, np.cumsum(cuts)[:-1])
    close(np.concatenate([stream.feed(part) for part in parts]), expected)
    assert stream.position == 41


def test_which_outputs(vector_session: rt.Session, expected: Any) -> None:
    stream = vector_session.stream()
    assert stream.feed(VECTORS[:20], outputs="none") is None
    close(stream.feed(VECTORS[20:30], outputs="last"), expected[29])
    close(stream.feed([], outputs="last"), expected[29])
    close(stream.step(VECTORS[30]), expected[30])
    close(stream.feed(VECTORS[31:40]), expected[31:40])
    assert stream.feed(np.empty((0, SIZE)), outputs="all").shape == (0, OUTPUTS)  # type: ignore[union-attr]
    with pytest.raises(rt.Error, match="at least one token"):
        vector_session.stream().feed([], outputs="last")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(len(x), 3, SIZE // 3),
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: x.tolist(),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    ],
    ids=["views", "float64", "fortran", "list", "strided"],
)
def test_floats_of_any_kind(vector_session: rt.Session, change: Callable[[Any], Any], expected: Any) -> None:
    stream = vector_session.stream()
    close(stream.feed(change(VECTORS[:9])), expected[:9])
    close(stream.step(change(VECTORS[9:10])[0]), expected[9])


def test_fork_reset_freeze_and_memory(vector_session: rt.Session, model: Weights, expected: Any) -> None:
    stream, reference = vector_session.stream(), Reference(model, period=PERIOD)
    stream.feed(VECTORS[:21], outputs="none")
    twin = stream.fork()
    close(twin.feed([], outputs="last"), expected[20])
    twin.freeze()
    reference.feed(VECTORS[:21])
    reference.learning = False
    close(twin.feed(VECTORS[21:]), reference.feed(VECTORS[21:]))
    np.testing.assert_allclose(twin.memory()[MEMORY + ".W0"][0, 0], reference.memory, **TOLERANCE)
    close(stream.feed(VECTORS[21:]), expected[21:])
    before = stream.state_bytes
    stream.reset()
    assert stream.position == 0
    close(stream.feed(VECTORS), expected)
    assert stream.state_bytes == before


def refuse(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(rt.Error) as caught:
        action()
    message = str(caught.value)
    assert FORM.fullmatch(message), message
    assert caught.value.status == INVALID_ARGUMENT
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300], ids=str)
def test_numbers_that_are_not_finite_change_nothing(vector_session: rt.Session, expected: Any, value: float) -> None:
    stream = vector_session.stream()
    stream.feed(VECTORS[:3], outputs="none")
    wrong = VECTORS[3:25].astype(np.float64)
    wrong[17, 4] = value
    refuse(lambda: stream.feed(wrong), "vector 17", "element 4", "finite")
    refuse(lambda: stream.step(wrong[17]), "vector 0")
    assert stream.position == 3
    close(stream.feed(VECTORS[3:]), expected[3:])


@pytest.mark.parametrize(
    "given",
    [
        [1, 2, 3],
        b"bytes",
        "text",
        np.ones((4, SIZE), np.int64),
        np.ones((4, SIZE), bool),
        np.ones((4, SIZE - 1)),
        np.ones(SIZE),
        np.ones((2, 2, SIZE)),
        np.ones((1, 2, 2, SIZE // 4)),
        [[1.0], [1.0, 2.0]],
        3,
        1.5,
        None,
    ],
    ids=lambda given: f"{type(given).__name__} {np.shape(given) if isinstance(given, np.ndarray) else given!r}",
)
def test_what_are_no_vectors(vector_session: rt.Session, given: Any) -> None:
    stream = vector_session.stream()
    refuse(lambda: stream.feed(given), f"(T, {SIZE})")
    assert stream.position == 0


@pytest.mark.parametrize(
    "given", [3, 1.5, np.ones(SIZE - 1), np.ones(SIZE, int), np.ones((1, 1, SIZE)), [], [[1.0], []]]
)
def test_a_step_with_what_is_no_vector(vector_session: rt.Session, given: Any) -> None:
    refuse(lambda: vector_session.stream().step(given), f"(T, {SIZE})")


def test_what_needs_tokens(vector_session: rt.Session) -> None:
    stream = vector_session.stream()
    stream.feed(VECTORS[:2], outputs="none")
    refuse(lambda: stream.score([1, 2]), "takes vectors", "got tokens")
    refuse(lambda: stream.generate(), "takes vectors", "got tokens")
    assert stream.position == 2


def test_vectors_for_a_bundle_of_tokens(session: rt.Session) -> None:
    stream = session.stream()
    for given in (np.ones((3, 16), np.float32), np.ones(3), [[0.5] * 16]):
        refuse(lambda given=given: stream.feed(given), "tokens", "float", "takes no vectors")
    refuse(lambda: stream.step(np.ones(16)), "tokens")
    assert stream.position == 0
