"""Guards, the log, progress and cancellation. The judge is the model in numpy, or a stream frozen by hand."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import shared_bundles
import xxhash
from onnx import numpy_helper
from synthetic import Reference, Weights, write_bundle

import titans_runtime as rt
from titans_runtime._library import TokenPointer, lib
from titans_runtime._progress import Watched

ROOT = Path(__file__).parent.parent.parent
FAILED, INVALID_ARGUMENT, CANCELLED = 1, 2, 5
SIZE = 12
BAD = 21
FORM = re.compile(r"\[[^\]]+\] .+\. Fix: .+ \(TITANS-E\d{4}\)")


@pytest.fixture(scope="module")
def model() -> Weights:
    return Weights.random(vocab=SIZE, outputs=5)


@pytest.fixture(scope="module")
def vector_session(tmp_path_factory: pytest.TempPathFactory, model: Weights) -> rt.Session:
    return rt.Session(write_bundle(tmp_path_factory.mktemp("bundles") / "v.titans", model, vectors=True), threads=1)


def sensor(at: int | None = BAD, size: float = 1e25) -> Any:
    """Readings, the one at `at` of that size."""
    vectors = np.random.default_rng(2).normal(size=(60, SIZE)).astype(np.float32)
    if at is not None:
        vectors[at] *= size
    return vectors


def reference(model: Weights, vectors: Any, frozen: set[int]) -> Any:
    judge, rows = Reference(model), []
    for at, vector in enumerate(vectors):
        judge.learning = at not in frozen
        rows.append(judge.step(vector))
    return np.stack(rows)


def close(got: Any, right: Any) -> None:
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


def test_one_reading_destroys_an_unguarded_memory(vector_session: rt.Session) -> None:
    stream = vector_session.stream()
    stream.feed(sensor(at=None), outputs="none")
    assert np.abs(stream.memory()["layers.0.memory.W0"]).max() < 1e3
    stream = vector_session.stream()
    stream.feed(sensor(), outputs="none")
    after = stream.feed(sensor(at=None))
    assert not np.abs(after).max() < 1e15  # or NaN


# The token after the bad one, too: its update is its own vector times the one before.
@pytest.mark.parametrize("cut", [1, 7, 60])
def test_skip_leaves_out_what_breaks_the_limit(vector_session: rt.Session, model: Weights, cut: int) -> None:
    stream = vector_session.stream()
    stream.guard("skip", max_update_norm=1e6)
    out = np.concatenate([stream.feed(sensor()[at : at + cut]) for at in range(0, 60, cut)])
    right = reference(model, sensor(), {BAD, BAD + 1})
    close(out[:BAD], right[:BAD])
    close(out[BAD + 1 :], right[BAD + 1 :])
    report = stream.guard_report
    assert (report.rollbacks, report.position, report.reason) == (2, BAD + 2, "update norm")
    assert (report.layer, report.head) == (0, 0) and report.update_norm > 1e15
    assert report.chunks >= 60 and 0 < report.peak_update_norm < 1e6
    assert stream.learning and stream.position == 60


def test_freeze_learns_no_more(vector_session: rt.Session, model: Weights) -> None:
    stream = vector_session.stream()
    stream.guard("freeze", max_update_norm=1e6)
    out = stream.feed(sensor())
    right = reference(model, sensor(), set(range(BAD, 60)))
    close(out[BAD + 1 :], right[BAD + 1 :])
    assert stream.guard_report.rollbacks == 1 and not stream.learning


def test_raise_leaves_the_stream_as_it_was(vector_session: rt.Session, model: Weights) -> None:
    stream = vector_session.stream()
    stream.guard(max_update_norm=1e6)
    vectors = sensor()
    stream.feed(vectors[:10])
    with pytest.raises(rt.Error, match="update norm") as error:
        stream.feed(vectors[10:])
    assert error.value.status == FAILED and FORM.fullmatch(str(error.value))
    assert stream.position == 10
    close(stream.feed(vectors[10:BAD]), reference(model, vectors, set())[10:BAD])
    stream.guard("skip", max_update_norm=1e6)
    close(stream.feed(vectors[BAD:])[1:], reference(model, vectors, {BAD, BAD + 1})[BAD + 1 :])


# 1e38 makes infinity of the first product; of the output, which a limit does not see, as well.
def test_what_is_not_finite_needs_no_limit(vector_session: rt.Session) -> None:
    stream = vector_session.stream()
    stream.guard()
    with pytest.raises(rt.Error, match=r"\[guard\]") as error:
        stream.feed(sensor(size=1e38))
    assert error.value.status == FAILED
    assert stream.guard_report.reason in ("not finite", "output")
    assert stream.position == 0


def test_forks_and_resets_keep_the_guard(vector_session: rt.Session, model: Weights) -> None:
    stream = vector_session.stream()
    stream.guard("skip", max_update_norm=1e6)
    vectors = sensor()
    stream.feed(vectors[:BAD])
    twin = stream.fork()
    stream.reset()
    right = reference(model, vectors, {BAD, BAD + 1})[BAD + 1 :]
    close(twin.feed(vectors[BAD:])[1:], right)
    close(stream.feed(vectors)[BAD + 1 :], right)
    assert twin.guard_report.rollbacks == stream.guard_report.rollbacks == 2


def test_off_is_off(vector_session: rt.Session) -> None:
    stream = vector_session.stream()
    assert stream.guard_report == rt.GuardReport(0, 0, None, -1, -1, 0, 0, 0, 0, 0)
    stream.guard("off")
    unguarded = stream.state_bytes
    stream.guard("skip", max_update_norm=1e6)
    assert stream.state_bytes > unguarded
    stream.guard("off")
    stream.feed(sensor(), outputs="none")
    assert stream.guard_report.rollbacks == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy": "never"},
        {"max_update_norm": 0},
        {"max_update_norm": float("nan")},
        {"max_surprise": -1},
        {"max_surprise": 1e-60},
        {"max_surprise": 1e60},
    ],
    ids=str,
)
def test_refuses_what_is_no_guard(vector_session: rt.Session, arguments: Any) -> None:
    with pytest.raises(rt.Error) as error:
        vector_session.stream().guard(**arguments)
    assert error.value.status == INVALID_ARGUMENT and FORM.fullmatch(str(error.value))


# ---- on a trained model ----


@pytest.fixture(scope="module")
def eager_model(tmp_path_factory: pytest.TempPathFactory) -> rt.Session:
    """mac-bytes with a step limit of 2.5, which is no contraction: prose is fine, a byte that repeats is not."""
    folder = tmp_path_factory.mktemp("bundles") / "eager.titans"
    shutil.copytree(shared_bundles.mac_bytes(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for graph in manifest["graphs"]:
        model = onnx.load(folder / graph["file"], load_external_data=False)
        inline = [one for one in model.graph.initializer if not one.dims and one.data_type == onnx.TensorProto.FLOAT]
        (limit,) = (one for one in inline if numpy_helper.to_array(one) == np.float32(1 / 64))  # step limit / chunk
        limit.CopyFrom(numpy_helper.from_array(np.array(2.5 / 64, np.float32), limit.name))
        data = model.SerializeToString()
        (folder / graph["file"]).write_bytes(data)
        manifest["files"][graph["file"]] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rt.Session(folder, threads=1)


PROSE = (ROOT / "LICENSE").read_bytes()
ATTACK = bytes(8192)
LIMIT = 0.8  # the largest surprise of the prose is 0.65


def bits(stream: rt.Stream) -> float:
    return float(-stream.score(PROSE[4096:6144]).mean() / np.log(2))


@pytest.fixture(scope="module")
def reader(eager_model: rt.Session) -> rt.Stream:
    """It has read some prose, under a guard that had nothing to say."""
    stream = eager_model.stream()
    stream.guard("raise", max_surprise=LIMIT)
    stream.feed(PROSE[:4096], outputs="none")
    report = stream.guard_report
    assert report.rollbacks == 0 and report.chunks == 2 * 64 and 0 < report.peak_surprise < LIMIT
    return stream


def frozen_by_hand(reader: rt.Stream) -> float:
    stream = reader.fork()
    stream.guard("off")
    stream.freeze()
    stream.feed(ATTACK, outputs="none")
    stream.resume()
    return bits(stream)


def test_the_attack_destroys_an_unguarded_stream(reader: rt.Stream) -> None:
    stream = reader.fork()
    stream.guard("off")
    stream.feed(ATTACK[:2048], outputs="none")
    assert not max(np.abs(values).max() for values in stream.memory().values()) < 1e9
    assert bits(stream.fork()) > frozen_by_hand(reader) + 0.4
    with pytest.raises(rt.Error, match="finite"):  # NaN, which kernels refuse
        stream.feed(ATTACK, outputs="none")


@pytest.mark.parametrize("policy", ["raise", "freeze", "skip"])
def test_each_policy_holds(reader: rt.Stream, policy: Any) -> None:
    """What the stream predicts afterwards is as good as without the attack."""
    stream = reader.fork()
    stream.guard(policy, max_surprise=LIMIT)
    if policy == "raise":
        with pytest.raises(rt.Error, match=r"a surprise of at most 0\.8"):
            stream.feed(ATTACK, outputs="none")
        assert bits(stream) == bits(reader.fork())
        return
    stream.feed(ATTACK, outputs="none")
    assert stream.guard_report.rollbacks > (100 if policy == "skip" else 0)
    assert stream.learning == (policy == "skip")
    stream.resume()
    assert abs(bits(stream) - frozen_by_hand(reader)) < 0.1


# Without limits, W grows until a number overflows: only then is there something to see.
def test_without_limits_what_overflows_is_seen(reader: rt.Stream) -> None:
    stream = reader.fork()
    stream.guard("freeze")
    stream.feed(ATTACK, outputs="none")
    assert stream.guard_report.reason in ("not finite", "output", "call")
    assert all(np.isfinite(values).all() for values in stream.memory().values())
    assert np.isfinite(bits(stream))


def test_a_chunk_that_is_skipped_is_one_that_was_frozen(reader: rt.Stream) -> None:
    """Bit by bit, for any cut: a limit that every chunk breaks."""
    text = PROSE[4096:4416]  # five chunks
    by_hand = reader.fork()
    by_hand.guard("off")
    by_hand.freeze()
    for byte in text:
        by_hand.step(byte)
    for cut in (1, 50, 320):
        stream = reader.fork()
        stream.guard("skip", max_update_norm=1e-30)
        for at in range(0, len(text), cut):
            stream.feed(text[at : at + cut], outputs="none")
        assert stream.guard_report.rollbacks == 5
        for name, values in by_hand.memory().items():
            if re.search(r"\.[WSmf]\d?$|\.beta$|\.[ea]$", name):
                assert np.array_equal(stream.memory()[name], values), name
        # The caches, too, but for the order of sums in graphs of one token and of 64.
        stream.freeze()
        np.testing.assert_allclose(stream.step(120), by_hand.fork().step(120), rtol=1e-3, atol=1e-3)


def test_a_call_that_fails_on_the_way_back_leaves_the_stream_as_it_was(reader: rt.Stream) -> None:
    """The caches, too, whose rows from before the call have been written again."""
    text = PROSE[4096:4160]
    stream, twin = reader.fork(), reader.fork()
    for one in (stream, twin):
        one.guard("skip", max_update_norm=1e-30)
        one.feed(text[:40], outputs="none")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise LookupError("at the end")

    with pytest.raises(LookupError, match="at the end"):
        stream.feed(text[40:], progress=stop)
    assert stream.guard_report.rollbacks == 1 and stream.position == twin.position
    for name, values in twin.memory().items():
        # Of the open chunk nobody reads rows beyond its fill.
        rows = np.s_[:, :, :40] if re.search(r"\.(layer_input|output_grad)\d$", name) else np.s_[...]
        assert np.array_equal(stream.memory()[name][rows], values[rows]), name
    for one in (stream, twin):
        one.guard("off")
        one.freeze()
    assert np.array_equal(stream.feed(text), twin.feed(text))


# ---- log ----


def test_messages_go_to_logging(
    bundle: Path, vector_session: rt.Session, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "titans_runtime"):
        rt.Session(bundle, threads=1).close()
        stream = vector_session.stream()
        stream.guard("skip", max_update_norm=1e6)
        stream.feed(sensor(), outputs="none")
    told = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "titans_runtime"]
    assert told[0][0] == logging.INFO and f"[session] opened {bundle} on cpu" in told[0][1]
    assert [level for level, _ in told[1:]] == [logging.WARNING] * 2
    assert told[1][1].startswith("[guard] expected an update norm of at most 1e+06, got ")
    assert capfd.readouterr().err == ""  # an application that sets up no logging sees nothing


# ---- progress and cancellation ----

LONG = np.zeros(400_000, np.uint8)  # half a second or more


def test_progress_is_told(session: rt.Session) -> None:
    told: list[tuple[int, int]] = []
    stream = session.stream()
    stream.feed(range(15), "none", progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 15), (12, 15), (13, 15), (14, 15), (15, 15)]
    told.clear()
    stream.score([1, 2], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)
    stream.feed([1, 2, 3])
    assert told[-1] == (2, 2)


def test_what_progress_raises_ends_the_call(session: rt.Session) -> None:
    stream, twin = session.stream(), session.stream()

    def stop(done: int, _total: int) -> None:
        if done >= 12:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        stream.feed(range(15), progress=stop)
    assert stream.position == 0
    assert np.array_equal(stream.feed([1, 2, 3]), twin.feed([1, 2, 3]))


def test_another_thread_comes_between(session: rt.Session) -> None:
    """It may still have the function of a call that was refused meanwhile."""
    stream = session.stream()
    told: list[int] = []
    watched = Watched(stream._open(), stream._watcher, lambda done, total: told.append(done))
    done, count = ctypes.c_int(-1), ctypes.c_size_t()
    tokens = np.zeros(LONG.size, np.int32)

    def feed() -> None:
        pointer = tokens.ctypes.data_as(TokenPointer)
        done.value = lib.titans_stream_feed(stream._open(), pointer, tokens.size, 0, None, 0)

    thread = threading.Thread(target=feed)
    with watched:
        thread.start()
        # Only a call that is refused tells that the other one is in the stream.
        while thread.is_alive() and lib.titans_stream_marks(stream._open(), None, 0, ctypes.byref(count)) == 0:
            pass
        assert thread.is_alive()
    del watched
    gc.collect()
    thread.join()
    assert done.value == 0 and told == []
    assert stream.position == LONG.size
    stream.feed([1, 2], progress=lambda done, total: told.append(done))
    assert told[-1] == 2


def test_another_thread_cancels_a_long_feed(session: rt.Session) -> None:
    stream, twin = session.stream(), session.stream()
    for one in (stream, twin):
        one.feed([3, 1, 4, 1])
    stream.cancel()  # nothing runs, so nothing ends
    stream.feed([5])
    twin.feed([5])
    started = threading.Event()

    def cancel() -> None:
        started.wait(60)
        stream.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    before = session.metrics().cancelled
    with pytest.raises(rt.Error, match="cancelled after") as error:
        stream.feed(LONG, "none", progress=lambda done, total: started.set())
    thread.join()
    assert error.value.status == CANCELLED and FORM.fullmatch(str(error.value))
    assert session.metrics().cancelled == before + 1
    assert stream.position == twin.position == 5
    for name, values in twin.memory().items():
        assert np.array_equal(stream.memory()[name], values)
    assert np.array_equal(stream.feed([9, 2, 6]), twin.feed([9, 2, 6]))


PROGRAM = """
import sys, numpy as np
import titans_runtime as rt
stream = rt.Session(sys.argv[1], threads=1).stream()
stream.feed([1, 2, 3])
print("ready", flush=True)
try:
    while True:
        stream.feed(np.zeros(4_000_000, np.uint8), "none")
        stream.reset()
except KeyboardInterrupt:
    print("interrupted at", stream.position, flush=True)
    stream.feed([1, 2, 3])
"""


# More streams than threads: two of them run, one waits for its turn, and one was done.
BATCH_PROGRAM = """
import sys, numpy as np
import titans_runtime as rt
session = rt.Session(sys.argv[1], threads=1, batch_threads=2)
streams = [session.stream() for _ in range(4)]
print("ready", flush=True)
try:
    while True:
        session.feed_batch(streams, [[1, 2, 3]] + 3 * [np.zeros(4_000_000, np.uint8)], "none")
        for stream in streams:
            stream.reset()
except KeyboardInterrupt:
    print("interrupted at", *(stream.position for stream in streams), flush=True)
    session.feed_batch(streams, 4 * [[1, 2, 3]])
"""


@pytest.mark.parametrize("program", [PROGRAM, BATCH_PROGRAM], ids=["feed", "batch"])
def test_ctrl_c_ends_a_long_feed(bundle: Path, program: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program, str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(1)  # three tokens are fed by then, on a busy machine too
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    # The first feed takes several seconds, and was ended, or all of a later one.
    assert child.returncode == 0 and re.fullmatch(r"interrupted at (3|0|3 0 0 0)\n", out), out + err
