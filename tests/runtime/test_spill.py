"""A memory budget, on ONNX Runtime: streams beyond it wait in files and come back bit by bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import titans_runtime as rt

VOCAB = 16
RANDOM = np.random.default_rng(4)
SEQUENCES = [RANDOM.integers(0, VOCAB, 12) for _ in range(40)]


@pytest.fixture(scope="module")
def alone(session: rt.Session) -> list[Any]:
    return [session.stream().feed(sequence) for sequence in SEQUENCES]


def open_session(bundle: Path, folder: Path, streams: float) -> rt.Session:
    with rt.Session(bundle, threads=1) as probe, probe.stream() as stream:
        budget = int(streams * stream.state_bytes)
    return rt.Session(bundle, threads=1, batch_threads=2, memory_budget=budget, spill_dir=folder)


def spilled(folder: Path) -> int:
    return len(list(folder.glob("titans-spill-*/*.tstate")))


def test_streams_beyond_the_budget(bundle: Path, tmp_path: Path, alone: list[Any]) -> None:
    session = open_session(bundle, tmp_path, 5.5)
    streams = [session.stream() for _ in SEQUENCES]
    size = streams[0].state_bytes
    for at in range(12):
        logits = session.step_batch(streams, [int(sequence[at]) for sequence in SEQUENCES])
        np.testing.assert_array_equal(logits, [expected[at] for expected in alone])
        metrics = session.metrics()
        assert metrics.resident_bytes == 5 * size
        assert metrics.state_bytes == 40 * size
        assert metrics.spilled - metrics.restored == spilled(tmp_path) == 35
    moves = session.metrics().restored
    assert [stream.position for stream in streams] == [12] * 40
    assert all(stream.learning for stream in streams)
    assert session.metrics().restored == moves  # these need no state
    memory = streams[7].memory()
    with rt.Session(bundle, threads=1) as other:
        same = other.stream()
        same.feed(SEQUENCES[7])
        for name, values in same.memory().items():
            np.testing.assert_array_equal(memory[name], values)
    streams[3].save(tmp_path / "three.tstate")
    restored = session.restore(tmp_path / "three.tstate")
    np.testing.assert_array_equal(restored.feed([], outputs="last"), alone[3][11])
    for stream in (*streams, restored):
        stream.close()
    assert spilled(tmp_path) == 0
    assert session.metrics().resident_bytes == 0
    session.close()
    assert not list(tmp_path.glob("titans-spill-*"))


def test_marks_guards_and_generations_of_spilled_streams(bundle: Path, tmp_path: Path, session: rt.Session) -> None:
    def play(session: rt.Session, crowd: int) -> list[Any]:
        def push_out() -> None:
            others = [session.stream() for _ in range(crowd)]
            assert len(others) == crowd

        stream = session.stream()
        stream.guard("skip", max_surprise=1e6)
        stream.feed(SEQUENCES[0][:5], outputs="none")
        push_out()
        at = stream.mark()
        push_out()
        out = [stream.feed(SEQUENCES[0][5:])]
        push_out()
        twin = stream.fork()
        push_out()
        stream.rewind(at)
        push_out()
        out += [stream.feed(SEQUENCES[1]), np.array(list(twin.generate(5, seed=1))), np.array(stream.marks)]
        return out

    budgeted = play(open_session(bundle, tmp_path, 4), 8)
    for got, expected in zip(budgeted, play(session, 0), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_threads_that_push_each_other_out(bundle: Path, tmp_path: Path, alone: list[Any]) -> None:
    session = open_session(bundle, tmp_path, 3)
    wrong: list[int] = []

    def work(first: int) -> None:
        streams = [session.stream() for _ in range(4)]
        for at in range(12):
            for i, stream in enumerate(streams):
                if not np.array_equal(stream.step(int(SEQUENCES[first + i][at])), alone[first + i][at]):
                    wrong.append(first + i)

    threads = [threading.Thread(target=work, args=(4 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert session.metrics().spilled > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_budget": 1 << 30}, "spill_dir"),
        ({"memory_budget": 1, "spill_dir": "."}, "at least one stream"),
        ({"memory_budget": 1 << 30, "spill_dir": "/nowhere/at/all"}, "spill_dir is not a folder"),
        ({"memory_budget": -1, "spill_dir": "."}, "memory_budget"),
        ({"batch_threads": -1}, "batch_threads"),
    ],
)
def test_options_that_are_wrong(bundle: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(rt.Error, match=words) as caught:
        rt.Session(bundle, threads=1, **options)
    assert caught.value.status == 2
