"""Many streams in one call, on ONNX Runtime, compared with each stream alone and with the model in numpy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_bundles
from synthetic import Reference, Weights, write_bundle

import titans_runtime as rt
from titans_export.bundle import read_bundle
from titans_runtime._library import ProgressFunction, lib

VOCAB = 16
RANDOM = np.random.default_rng(3)
SEQUENCES = [RANDOM.integers(0, VOCAB, 40) for _ in range(12)]


@pytest.fixture(scope="module", params=[1, 3], ids=["one-thread", "three-threads"])
def batch_session(request: pytest.FixtureRequest, bundle: Path) -> rt.Session:
    return rt.Session(bundle, threads=1, batch_threads=request.param)


@pytest.fixture(scope="module")
def alone(session: rt.Session) -> list[Any]:
    return [session.stream().feed(sequence) for sequence in SEQUENCES]


def test_steps_of_streams_that_join_and_leave(batch_session: rt.Session, alone: list[Any], weights: Weights) -> None:
    streams = [batch_session.stream() for _ in SEQUENCES]
    for turn in range(60):
        there = [i for i, stream in enumerate(streams) if (turn + i) % 3 and stream.position < 40]
        there = there[turn % 5 :] + there[: turn % 5]
        positions = [streams[i].position for i in there]
        logits = batch_session.step_batch(
            [streams[i] for i in there], [int(SEQUENCES[i][at]) for i, at in zip(there, positions, strict=True)]
        )
        assert logits.shape == (len(there), VOCAB)
        for row, i, at in zip(logits, there, positions, strict=True):
            np.testing.assert_array_equal(row, alone[i][at])
    assert min(stream.position for stream in streams) == 40
    np.testing.assert_allclose(alone[3], Reference(weights).feed(SEQUENCES[3]), rtol=1e-4, atol=1e-4)


def test_feeds_of_different_lengths(batch_session: rt.Session, alone: list[Any]) -> None:
    streams = [batch_session.stream() for _ in SEQUENCES]
    lengths = [0, 1, 2, 3, 5, 8, 13, 21, 34, 40, 7, 4]
    heads = [sequence[:n] for sequence, n in zip(SEQUENCES, lengths, strict=True)]
    tails = [sequence[n:] for sequence, n in zip(SEQUENCES, lengths, strict=True)]
    all_rows = batch_session.feed_batch(streams, heads, outputs="all")
    for rows, n, expected in zip(all_rows, lengths, alone, strict=True):
        np.testing.assert_array_equal(rows, expected[:n])
    assert batch_session.feed_batch(streams[:2], tails[:2], outputs="none") is None
    last = batch_session.feed_batch(streams[2:], tails[2:])
    np.testing.assert_array_equal(last, [expected[39] for expected in alone[2:]])
    assert [stream.position for stream in streams] == [40] * 12
    for stream, expected in zip(streams, alone, strict=True):
        np.testing.assert_array_equal(stream.feed([], outputs="last"), expected[39])


def test_what_fails_in_a_batch(batch_session: rt.Session, alone: list[Any]) -> None:
    a, b, c = (batch_session.stream() for _ in range(3))
    first = [int(sequence[0]) for sequence in SEQUENCES]
    with pytest.raises(rt.BatchError, match=r"^\[batch\] 1 of 3 streams failed, stream 1 first: .*token 0") as caught:
        batch_session.step_batch([a, b, c], [first[0], VOCAB, first[2]])
    assert caught.value.statuses == [0, 2, 0]
    assert isinstance(caught.value.outputs, np.ndarray)
    np.testing.assert_array_equal(caught.value.outputs, [alone[0][0], np.zeros(VOCAB), alone[2][0]])
    assert [stream.position for stream in (a, b, c)] == [1, 0, 1]
    with pytest.raises(rt.BatchError, match="stream 0 is also stream 2") as caught:
        batch_session.step_batch([a, b, a], first[:3])
    assert caught.value.statuses == [2, 2, 2]
    other = batch_session.stream()
    other.close()
    for streams, tokens, words in (
        ([a, b], [1], "2 tokens"),
        ([a], [[1]], "one dimension"),
        ([other], [1], "is closed"),
    ):
        with pytest.raises(rt.Error, match=words) as refused:
            batch_session.step_batch(streams, tokens)
        assert refused.value.status == 2
    with pytest.raises(rt.Error, match="2 sequences"):
        batch_session.feed_batch([a, b], [[1]])
    with pytest.raises(rt.Error, match="'all', 'last' or 'none'"):
        batch_session.feed_batch([a], [[1]], outputs="first")  # type: ignore[arg-type]
    assert batch_session.step_batch([], []).shape == (0, VOCAB)
    assert batch_session.feed_batch([], [], outputs="all") == []
    assert [stream.position for stream in (a, b, c)] == [1, 0, 1]


def test_one_that_fails_midway_has_no_logits(batch_session: rt.Session, session: rt.Session) -> None:
    good, bad = batch_session.stream(), batch_session.stream()
    stop = ProgressFunction(lambda _user, done, _total: int(done > 8))
    assert lib.titans_stream_set_progress(bad._open(), stop, None) == 0
    with pytest.raises(rt.BatchError, match="stream 1 first") as caught:
        batch_session.feed_batch([good, bad], [range(12), range(12)], outputs="all")
    assert isinstance(caught.value.outputs, list)
    np.testing.assert_array_equal(caught.value.outputs[0], session.stream().feed(range(12)))
    assert not caught.value.outputs[1].any()
    assert (good.position, bad.position) == (12, 0)


def test_streams_of_another_session(batch_session: rt.Session, session: rt.Session) -> None:
    with pytest.raises(rt.BatchError, match="stream 1 belongs to another session"):
        batch_session.step_batch([batch_session.stream(), session.stream()], [1, 2])


def test_bundles_of_vectors(tmp_path: Path) -> None:
    model = Weights.random(vocab=6, outputs=5)
    with rt.Session(
        write_bundle(tmp_path / "vectors.titans", model, vectors=True), threads=1, batch_threads=2
    ) as session:
        vectors = [RANDOM.standard_normal((n, session.input_size)).astype(np.float32) for n in (3, 9)]
        alone = [session.stream().feed(rows) for rows in vectors]
        streams = [session.stream() for _ in vectors]
        steps = session.step_batch(streams, np.stack([rows[0] for rows in vectors]))
        rest = session.feed_batch(streams, [rows[1:] for rows in vectors], outputs="all")
        for step, rows, expected in zip(steps, rest, alone, strict=True):
            np.testing.assert_array_equal(np.concatenate([step[None], rows]), expected)
        with pytest.raises(rt.Error, match="float vectors"):
            session.step_batch(streams, [1, 2])


def test_many_threads_with_batches_of_their_own(bundle: Path, alone: list[Any]) -> None:
    session = rt.Session(bundle, threads=1, batch_threads=2)
    wrong: list[str] = []

    def work(offset: int) -> None:
        streams = [session.stream() for _ in range(4)]
        for at in range(40):
            got = session.step_batch(streams, [int(SEQUENCES[offset + i][at]) for i in range(4)])
            if not np.array_equal(got, [alone[offset + i][at] for i in range(4)]):
                wrong.append(f"{offset} at {at}")

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_among_hundreds_that_do_their_worst(bundle: Path, alone: list[Any], tmp_path: Path) -> None:
    """Neighbours whose memory is not finite, reset, forked, restored and ended, in the same batches."""
    session = rt.Session(bundle, threads=1, batch_threads=2)
    watched = session.stream()
    neighbours = [session.stream() for _ in range(200)]
    session.feed_batch(neighbours, [RANDOM.integers(0, VOCAB, int(n)) for n in RANDOM.integers(1, 9, 200)])
    neighbours[0].save(tmp_path / "one.tstate")
    poisoned = session.stream()
    poisoned.feed([1, 2, 3])
    poisoned.save(tmp_path / "poisoned.tstate")
    poison(tmp_path / "poisoned.tstate")
    for at in range(40):
        for i in RANDOM.integers(0, 200, 8):
            change = RANDOM.integers(0, 4)
            if change == 0:
                neighbours[i].reset()
            elif change == 1:
                neighbours[i] = neighbours[i].fork()
            else:
                neighbours[i] = session.restore(tmp_path / ("one.tstate" if change == 2 else "poisoned.tstate"))
        chosen = [neighbours[i] for i in RANDOM.choice(200, 60, replace=False)]
        place = int(RANDOM.integers(0, 61))
        batch = [*chosen[:place], watched, *chosen[place:]]
        tokens = RANDOM.integers(0, VOCAB, 61)
        tokens[place] = SEQUENCES[5][at]
        np.testing.assert_array_equal(session.step_batch(batch, tokens)[place], alone[5][at])
    assert not np.isfinite(session.restore(tmp_path / "poisoned.tstate").feed([1, 2])).any()


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    """A bundle whose graphs take many streams."""
    return write_bundle(tmp_path_factory.mktemp("pooled") / "leaky.titans", weights, streams=True)


def test_streams_share_graph_calls(pooled: Path, weights: Weights) -> None:
    session = rt.Session(pooled, threads=1, batch_threads=2, batch="fast")
    assert session.info["batch"] == {"mode": "fast", "streams_per_call": 64}
    assert all(state["in_place"] for state in session.info["state"])
    expected = [Reference(weights).feed(sequence) for sequence in SEQUENCES]
    streams = [session.stream() for _ in SEQUENCES]
    lengths = [0, 1, 2, 3, 5, 8, 13, 21, 34, 40, 7, 4]
    heads = session.feed_batch(streams, [s[:n] for s, n in zip(SEQUENCES, lengths, strict=True)], outputs="all")
    for rows, n, right in zip(heads, lengths, expected, strict=True):
        np.testing.assert_allclose(rows, right[:n], rtol=1e-4, atol=1e-4)
    for at in range(30):
        there = [i for i, stream in enumerate(streams) if stream.position < 40 and (i + at) % 4]
        tokens = [int(SEQUENCES[i][streams[i].position]) for i in there]
        rows = session.step_batch([streams[i] for i in there], tokens)
        for i, row in zip(there, rows, strict=True):
            np.testing.assert_allclose(row, expected[i][streams[i].position - 1], rtol=1e-4, atol=1e-4)
    with pytest.raises(rt.Error, match="unknown batch"):
        rt.Session(pooled, batch="quick")


@pytest.mark.parametrize("batch", ["exact", "fast"])
def test_forks_share_the_prefill_of_their_prompt(pooled: Path, weights: Weights, batch: str) -> None:
    session = rt.Session(pooled, threads=1, batch_threads=2, batch=batch)
    prompt = SEQUENCES[0]
    streams = [session.stream()]
    streams[0].feed(prompt, outputs="none")
    streams += [streams[0].fork() for _ in range(20)]
    before = session.metrics()
    assert (before.tokens, before.calls) == (len(prompt), 1)
    rows = session.step_batch(streams, [i % VOCAB for i in range(21)])
    for i, row in enumerate(rows):
        right = Reference(weights).feed([*prompt, i % VOCAB])[-1]
        np.testing.assert_allclose(row, right, rtol=1e-4, atol=1e-4)
    assert session.metrics().tokens == len(prompt) + 21


@pytest.mark.long
def test_fast_batches_stay_within_the_tolerance_over_10000_tokens() -> None:
    """mac-bytes over text: streams that decode, prefill and pause, each compared with itself alone."""
    bundle = read_bundle(shared_bundles.mac_bytes())
    limits = bundle.limits()
    alone = rt.Session(bundle.path, threads=1)
    session = rt.Session(bundle.path, threads=1, batch_threads=1, batch="fast")
    assert session.info["batch"]["streams_per_call"] > 1
    text = b"".join(path.read_bytes() for path in sorted((shared_bundles.ROOT / "docs").glob("*.md")))
    count = 10_000
    texts = [np.frombuffer(text[i * count : (i + 1) * count], np.uint8) for i in range(4)]
    random = np.random.default_rng(1)
    both = [(session.stream(), alone.stream()) for _ in texts]
    while min(stream.position for stream, _ in both) < count:
        starts = [stream.position for stream, _ in both]
        ends = [start + int(random.choice([0, 1, 1, 5, 63, 64, 65, 200])) for start in starts]
        parts = [own[start:end] for own, start, end in zip(texts, starts, ends, strict=True)]
        rows = session.feed_batch([stream for stream, _ in both], parts, outputs="all")
        for (_, stream), part, got, start in zip(both, parts, rows, starts, strict=True):
            errors = np.abs(got - stream.feed(part)).max(-1, initial=0)
            assert (errors <= limits.at(start, len(part))).all(), start
    golden = bundle.golden()
    (rows,) = session.feed_batch([session.stream()], [golden.inputs], outputs="all")
    assert (golden.errors(rows, 0) <= limits.at(0, len(rows))).all()


def test_a_bundle_of_one_stream_per_call_runs_exactly(bundle: Path, alone: list[Any]) -> None:
    session = rt.Session(bundle, threads=1, batch_threads=2, batch="fast")
    assert session.info["batch"] == {"mode": "fast", "streams_per_call": 1}
    streams = [session.stream() for _ in SEQUENCES]
    for rows, right in zip(session.feed_batch(streams, SEQUENCES, outputs="all"), alone, strict=True):
        np.testing.assert_array_equal(rows, right)


@pytest.mark.parametrize("batch", ["exact", "fast"])
@pytest.mark.parametrize(
    ("count", "rounds"), [(12, 40), pytest.param(200, 150, marks=pytest.mark.long)], ids=["12", "200"]
)
def test_any_program_over_many_streams(pooled: Path, tmp_path: Path, batch: str, count: int, rounds: int) -> None:
    """Streams join, leave, fork, freeze, go back and are spilled; each gives what it gives alone."""
    random = np.random.default_rng(count)
    alone = rt.Session(pooled, threads=1)
    budget = alone.stream().state_bytes * count // 2
    spill = tmp_path / "spill"
    spill.mkdir()
    session = rt.Session(pooled, threads=1, batch_threads=2, batch=batch, memory_budget=budget, spill_dir=spill)
    both = [(session.stream(), alone.stream()) for _ in range(count)]
    worst = 0.0

    def compare(got: Any, right: Any) -> None:
        nonlocal worst
        if batch == "exact":
            np.testing.assert_array_equal(got, right)
        elif len(right):
            worst = max(worst, float(np.max(np.abs(got - right) / (1 + np.abs(right)))))

    for _ in range(rounds):
        chosen = random.choice(count, int(random.integers(1, count + 1)), replace=False)
        tokens = [random.integers(0, VOCAB, int(random.choice([0, 1, 1, 1, 3, 4, 5, 8, 9]))) for _ in chosen]
        got = session.feed_batch([both[i][0] for i in chosen], tokens, outputs="all")
        for i, sequence, rows in zip(chosen, tokens, got, strict=True):
            compare(rows, both[i][1].feed(sequence))
            assert both[i][0].position == both[i][1].position
        for _ in range(max(1, count // 8)):
            one, other = (int(i) for i in random.integers(0, count, 2))
            change = random.integers(0, 7)
            if change == 0:
                for stream in both[one]:
                    stream.reset()
            elif change == 1 and one != other:
                for stream in both[other]:
                    stream.close()
                both[other] = (both[one][0].fork(), both[one][1].fork())
            elif change == 2:
                for stream in both[one]:
                    (stream.freeze if stream.learning else stream.resume)()
            elif change == 3:
                for stream in both[one]:
                    stream.mark()
            elif change == 4 and both[one][1].marks:
                for stream in both[one]:
                    stream.rewind(both[one][1].marks[0])
            elif change == 5:
                for stream, place in zip(both[one], ("session", "alone"), strict=True):
                    stream.save(tmp_path / f"{place}.tstate")
                both[other] = (session.restore(tmp_path / "session.tstate"), alone.restore(tmp_path / "alone.tstate"))
            elif change == 6:
                both[other] = (session.stream(), alone.stream())
    assert worst < 1e-4
    metrics = session.metrics()
    assert metrics.spilled and metrics.restored
    assert metrics.tokens == alone.metrics().tokens


def poison(path: Path) -> None:
    """Every number of the state NaN, with a hash that is right."""
    import json

    import xxhash

    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    digits = json.loads(content[8 : 8 + length])["__metadata__"]["xxh3_128"].encode()
    content[8 + length :] = np.full((len(content) - 8 - length) // 4, np.nan, np.float32).tobytes()
    at = content.index(digits)
    content[at : at + 32] = b"0" * 32
    content[at : at + 32] = xxhash.xxh3_128_hexdigest(bytes(content)).encode()
    path.write_bytes(content)
