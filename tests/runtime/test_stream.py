"""Streams against the same model in numpy."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from synthetic import MEMORY, Reference, Weights, log_softmax

import titans_runtime as rt

TOKENS = np.random.default_rng(1).integers(0, 16, 53)
# float32 on both sides, sums of at most 6 terms in another order, decaying memory: rounding alone.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, **TOLERANCE)


@pytest.fixture
def expected(weights: Weights) -> npt.NDArray[np.float32]:
    return Reference(weights).feed(TOKENS)


@pytest.mark.parametrize(
    "cuts",
    [[53], [1] * 53, [8, 45], [3, 5, 8, 37], [4] * 13 + [1], [0, 7, 0, 46], [52, 1]],
    ids=lambda cuts: "-".join(map(str, cuts[:5])),
)
def test_any_cut_gives_the_same_logits(session: rt.Session, cuts: list[int], expected: Any) -> None:
    stream = session.stream()
    parts = np.split(TOKENS, np.cumsum(cuts)[:-1])
    close(np.concatenate([stream.feed(part) for part in parts]), expected)
    assert stream.position == 53


def test_which_logits(session: rt.Session, expected: Any) -> None:
    stream = session.stream()
    assert stream.feed(TOKENS[:20], outputs="none") is None
    last = stream.feed(TOKENS[20:30], outputs="last")
    assert last is not None and last.shape == (16,)
    close(last, expected[29])
    close(stream.feed([], outputs="last"), expected[29])
    close(stream.step(int(TOKENS[30])), expected[30])
    assert stream.feed([]).shape == (0, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tokens",
    [b"\1\2\3", bytearray(b"\1\2\3"), [1, 2, 3], (1, 2, 3), *(np.array([1, 2, 3], d) for d in "bBhHiIlLqQ")],
    ids=lambda tokens: getattr(getattr(tokens, "dtype", type(tokens)), "name", type(tokens).__name__),
)
def test_tokens_of_any_kind(session: rt.Session, tokens: Any) -> None:
    np.testing.assert_array_equal(session.stream().feed(tokens), session.stream().feed([1, 2, 3]))


def test_strided_tokens(session: rt.Session) -> None:
    np.testing.assert_array_equal(session.stream().feed(TOKENS[::3]), session.stream().feed(TOKENS[::3].copy()))


def test_fork_is_independent(session: rt.Session, expected: Any) -> None:
    stream = session.stream()
    stream.feed(TOKENS[:21], outputs="none")
    twin = stream.fork()
    twin.feed([5] * 9, outputs="none")
    close(stream.feed(TOKENS[21:]), expected[21:])
    assert (twin.position, stream.position) == (30, 53)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_handles_are_not_copied(session: rt.Session, duplicate: Any) -> None:
    stream = session.stream()
    stream.feed([1])
    for original, fix in ((session, "open the bundle"), (stream, "fork"), (stream.generate(max_tokens=1), "fork")):
        with pytest.raises(rt.Error, match=fix) as raised:
            duplicate(original)
        assert raised.value.code == "TITANS-E0516"


def test_fork_remembers_the_last_logits(session: rt.Session, expected: Any) -> None:
    stream = session.stream()
    stream.feed(TOKENS[:21], outputs="none")
    close(stream.fork().feed([], outputs="last"), expected[20])


def test_reset(session: rt.Session, expected: Any) -> None:
    stream = session.stream()
    stream.feed([3] * 11, outputs="none")
    stream.reset()
    assert stream.position == 0
    close(stream.feed(TOKENS), expected)


def test_freeze_and_resume(session: rt.Session, weights: Weights) -> None:
    stream, reference = session.stream(), Reference(weights)
    for learning, span in ((True, slice(0, 13)), (False, slice(13, 40)), (True, slice(40, 53))):
        (stream.resume if learning else stream.freeze)()
        reference.learning = learning
        assert stream.learning is learning
        close(stream.feed(TOKENS[span]), reference.feed(TOKENS[span]))


def test_reset_and_fork_keep_learning(session: rt.Session) -> None:
    stream = session.stream()
    stream.freeze()
    stream.reset()
    assert not stream.learning
    assert not stream.fork().learning


@pytest.mark.parametrize("cut", [0, 1, 10, 53])
def test_score(session: rt.Session, expected: Any, cut: int) -> None:
    stream = session.stream()
    got = np.concatenate([stream.score(TOKENS[:cut]), stream.score(TOKENS[cut:])])
    assert got[0] == np.float32(-np.log(16))
    close(got[1:], log_softmax(expected[:-1])[np.arange(52), TOKENS[1:]])


def test_score_of_large_logits_is_finite(session: rt.Session, weights: Weights, tmp_path: Path) -> None:
    from synthetic import write_bundle

    large = Weights(weights.embed, 1e30 * weights.unembed, weights.initial)
    with rt.Session(write_bundle(tmp_path / "large.titans", large)) as other:
        scores = other.stream().score([1, 2, 3])
    assert np.isfinite(scores).all() and (scores <= 0).all()


def test_memory(session: rt.Session, weights: Weights) -> None:
    stream, reference = session.stream(), Reference(weights)
    fresh = stream.memory()
    assert {name: array.shape for name, array in fresh.items()} == {
        MEMORY + ".W0": (1, 1, 6, 6),
        MEMORY + ".S0": (1, 1, 2),
    }
    np.testing.assert_array_equal(fresh[MEMORY + ".W0"][0, 0], weights.initial)
    np.testing.assert_array_equal(fresh[MEMORY + ".S0"][0, 0], [7, 8])
    stream.feed(TOKENS, outputs="none")
    reference.feed(TOKENS)
    close(stream.memory()[MEMORY + ".W0"][0, 0], reference.memory)
    np.testing.assert_array_equal(fresh[MEMORY + ".W0"][0, 0], weights.initial)  # a copy


def test_state_bytes_are_constant(session: rt.Session) -> None:
    stream = session.stream()
    before = stream.state_bytes
    stream.feed(np.tile(TOKENS, 20), outputs="none")
    assert stream.state_bytes == before > 0


def test_streams_on_threads(session: rt.Session, expected: Any) -> None:
    outputs: dict[int, Any] = {}

    def work(index: int) -> None:
        stream = session.stream()
        outputs[index] = np.stack([stream.step(int(token)) for token in TOKENS])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        close(outputs[index], expected)


def test_a_stream_outlives_its_session(bundle: Path, expected: Any) -> None:
    with rt.Session(bundle) as session:
        stream = session.stream()
    close(stream.feed(TOKENS), expected)
    with pytest.raises(rt.Error, match="closed"):
        session.stream()


def test_runs_are_repeatable(session: rt.Session) -> None:
    np.testing.assert_array_equal(session.stream().feed(TOKENS), session.stream().feed(TOKENS))
