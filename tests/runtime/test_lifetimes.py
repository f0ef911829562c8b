"""Signals, threads and lifetimes: what docs/runtime.md says of each, in programs of their own where one could end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as rt

LONG = np.zeros(400_000, np.uint8)

# Signals at random moments of every call. `storm` is the time between two signals, 0 for one alone.
SIGNALS = """
import os, random, signal, sys, time
import numpy as np
import titans_runtime as rt

bundle, folder, storm, rounds = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
ignored = []
def unraisable(found):
    # Python drops what a handler raises in a destructor, and in a weak set's callback, as of the threading module.
    dropped = getattr(found.object, "__module__", "") == "_weakrefset"
    if dropped or getattr(found.object, "__name__", "") == "__del__":
        raised[:] = [one for one in raised if one is not found.exc_value]
    else:
        ignored.append((found.exc_value, found.object))

sys.unraisablehook = unraisable
armed, raised = False, []

class Hit(Exception):
    pass

def handler(number, frame):
    if armed:
        raised.append({signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit, signal.SIGALRM: Hit}[number](7))
        raise raised[-1]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
for number in NUMBERS:
    signal.signal(number, handler)
session = rt.Session(bundle, threads=1, batch_threads=2)
streams = [session.stream() for _ in range(4)]
stream, twin = streams[0], session.stream()
draw = random.Random(int(sys.argv[4]))
tokens = np.arange(3000) % 7
path = os.path.join(folder, "one.tstate")
generation = lambda: [token for token in stream.generate(40)]
OPS = {
    "feed": (lambda: stream.feed(tokens, "none"), 3000, True),
    "score": (lambda: stream.score(tokens), 3000, True),
    "feed with progress": (lambda: stream.feed(tokens, "none", progress=lambda done, total: None), 3000, True),
    "batch": (lambda: session.feed_batch(streams, [tokens] * 4, "none"), 3000, True),
    "step": (lambda: stream.step(1), 1, True),
    "step batch": (lambda: session.step_batch(streams, [1, 2, 3, 4]), 1, True),
    "save": (lambda: stream.save(path), 0, True),
    "restore": (lambda: session.restore(path).close(), 0, True),
    "mark": (lambda: stream.unmark(stream.mark()), 0, True),
    "generate": (generation, 40, False),
}
stream.feed([1]); stream.save(path)
hits = 0
for index in range(rounds):
    for name, (call, more, whole) in OPS.items():
        before = [one.position for one in streams]
        memory = stream.memory()
        began = time.perf_counter()
        call()
        taken = time.perf_counter() - began
        for one, position in zip(streams, before):
            assert one.position in (position, position + more), name
        before = [one.position for one in streams]
        memory = stream.memory()
        raised.clear()
        # SIGALRM comes from the timer, the others from a process that waits as long.
        number = draw.choice(NUMBERS) if storm == 0 and taken > 0.004 else signal.SIGALRM
        got = None
        delay = max(1e-5, draw.random() * taken)
        waiting, starting = os.pipe()
        # Forked before handlers raise: Python ignores exceptions in what it does around a fork.
        if number != signal.SIGALRM and os.fork() == 0:
            os.read(waiting, 1)
            time.sleep(delay)
            os.kill(os.getppid(), number)
            os._exit(0)
        try:
            try:
                armed = True
                if number == signal.SIGALRM:
                    signal.setitimer(signal.ITIMER_REAL, delay, storm)
                else:
                    os.write(starting, b"x")
                call()
            finally:
                armed = False
        except BaseException as error:
            armed = False
            got = error
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        if number != signal.SIGALRM:
            os.write(starting, b"x")  # if an earlier signal came first
            os.wait()
        os.close(waiting)
        os.close(starting)
        if raised:
            hits += 1
            assert any(got is one for one in raised), (name, got, raised)
            assert got.args == (7,)
        else:
            assert got is None, (name, got)
        assert not ignored, (name, ignored)
        if storm == 0:
            assert [signal.getsignal(one) for one in NUMBERS] == [handler] * 3, name
        # No call runs any more, and each stream is as before the call or after it.
        for one, position in zip(streams, before):
            assert one.position in range(position, position + more + 1), name
            assert not whole or one.position in (position, position + more), name
        if more and stream.position == before[0]:
            for field, values in stream.memory().items():
                assert np.array_equal(values, memory[field]), (name, field)
        session.feed_batch(streams, [[1]] * 4)
        twin.feed([1])
        stream.marks and [stream.unmark(at) for at in stream.marks]
assert hits > rounds, hits
assert os.listdir(folder) == ["one.tstate"]
print("done", hits)
"""


@pytest.mark.parametrize("storm", [0, 0.0003])
def test_signals_in_every_call(bundle: Path, tmp_path: Path, storm: float) -> None:
    _signals(bundle, tmp_path, storm, 4)


@pytest.mark.long
@pytest.mark.parametrize("storm", [0, 0.0001, 0.002])
def test_many_signals(bundle: Path, tmp_path: Path, storm: float) -> None:
    _signals(bundle, tmp_path, storm, 150)


def _signals(bundle: Path, folder: Path, storm: float, rounds: int) -> None:
    command = [sys.executable, "-c", SIGNALS, str(bundle), str(folder), str(storm), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.startswith("done"), done.stdout + done.stderr


class TestClosing:
    def test_waits_for_a_call_of_another_thread(self, session: rt.Session) -> None:
        stream, ended = session.stream(), []
        started = threading.Event()

        def feed() -> None:
            stream.feed(LONG, "none", progress=lambda done, total: started.set())
            ended.append(True)

        thread = threading.Thread(target=feed)
        thread.start()
        assert started.wait(60)
        stream.close()
        assert not stream._calls._running
        thread.join()
        assert ended
        with pytest.raises(rt.Error, match="closed"):
            stream.feed([1])

    def test_waits_for_a_batch_and_a_generation(self, bundle: Path) -> None:
        session = rt.Session(bundle, threads=1, batch_threads=2)
        streams = [session.stream() for _ in range(3)]
        streams[0].feed([1])
        outcomes: list[object] = []

        def run(call: object) -> None:
            try:
                assert callable(call)
                outcomes.append(call())
            except rt.Error as error:
                outcomes.append(error.code)

        generation = streams[0].generate(None)
        calls = (lambda: session.feed_batch(streams[1:], [LONG] * 2, "none"), lambda: [token for token in generation])
        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        session.close()
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join()
        assert sorted(map(str, outcomes)) == ["None", "TITANS-E0515"]

    def test_is_refused_in_a_callback_of_the_call(self, session: rt.Session) -> None:
        stream = session.stream()
        stream.feed([1, 2])
        with pytest.raises(rt.Error, match="TITANS-E0503") as caught:
            stream.feed(range(15), progress=lambda done, total: stream.close())
        assert "callback" in str(caught.value)
        assert stream.position == 2
        stream.feed([3])

    def test_at_any_moment_of_calls_of_other_threads(self, bundle: Path) -> None:
        session = rt.Session(bundle, threads=1)
        unexpected: list[object] = []
        for index in range(60):
            stream = session.stream()

            def use(stream: rt.Stream = stream) -> None:
                try:
                    while True:
                        stream.step(1)
                        stream.feed([1, 2, 3], "none")
                        stream.memory()
                        stream.unmark(stream.mark())
                        assert stream.position >= 0
                except rt.Error as error:
                    if error.code not in ("TITANS-E0515", "TITANS-E0503"):
                        unexpected.append(error)

            threads = [threading.Thread(target=use) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(0.0003 * (index % 7))
            stream.close()
            for thread in threads:
                thread.join()
        assert unexpected == []

    def test_a_session_before_its_streams(self, bundle: Path) -> None:
        session = rt.Session(bundle)
        stream = session.stream()
        expected = session.stream().feed([1, 2, 3])
        session.close()
        session.close()
        assert np.array_equal(stream.feed([1, 2, 3]), expected)
        with pytest.raises(rt.Error, match="TITANS-E0515"):
            session.stream()
        with pytest.raises(rt.Error, match="TITANS-E0515"):
            session.feed_batch([stream], [[1]])


def test_a_callback_that_calls_back(session: rt.Session) -> None:
    """Another stream may be fed in a callback; the same one is refused, and its feed goes on if that is caught."""
    stream, other = session.stream(), session.stream()
    codes: list[str] = []

    def progress(done: int, total: int) -> None:
        other.feed([1, 2], progress=lambda done, total: None)
        try:
            stream.step(1)
        except rt.Error as error:
            codes.append(error.code)

    expected = session.stream().feed(range(15))
    assert np.array_equal(stream.feed(range(15), progress=progress), expected)
    assert set(codes) == {"TITANS-E0503"} and other.position == 2 * len(codes)


ENDS = {
    "daemon threads in calls": """
for _ in range(3):
    threading.Thread(target=lambda: session.stream().feed(LONG, "none"), daemon=True).start()
threading.Thread(target=lambda: session.feed_batch([session.stream() for _ in range(3)], [LONG] * 3, "none"),
                 daemon=True).start()
time.sleep(0.05)
""",
    "everything open": "streams = [session.stream() for _ in range(3)]; g = streams[0]; g.feed([1]); g = g.generate()",
    "a cycle": """
s = session.stream()
s.cycle = (s, session)
s.feed([1])
s.more = s.generate()
next(s.more)
del s, session
""",
    "the session first": "s = session.stream(); del session; gc.collect(); s.feed([1])",
    "a generation after its stream": """
s = session.stream()
s.feed([1])
g = s.generate(None)
next(g)
del s
gc.collect()
next(g)
""",
    "a logging handler that closes": """
stream = session.stream()
class Handler(logging.Handler):
    def emit(self, record):
        stream.close()
logging.getLogger("titans_runtime").addHandler(Handler())
logging.getLogger("titans_runtime").setLevel(1)
rt.Session(sys.argv[1]).close()
""",
    "an exit in a callback": """
def leave(done, total):
    raise SystemExit(0)
session.stream().feed(LONG, "none", progress=leave)
raise AssertionError
""",
    "atexit": "s = session.stream(); atexit.register(lambda: s.feed([1, 2])); atexit.register(session.close)",
}


@pytest.mark.parametrize("name", ENDS)
def test_programs_that_end(bundle: Path, name: str) -> None:
    start = (
        "import atexit, gc, logging, sys, threading, time\nimport numpy as np\nimport titans_runtime as rt\n"
        "session = rt.Session(sys.argv[1], threads=2, batch_threads=2)\nLONG = np.zeros(4_000_000, np.uint8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", start + ENDS[name], str(bundle)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr


SUBINTERPRETER = """
import sys
import _xxsubinterpreters as interpreters
one = interpreters.create()
try:
    interpreters.run_string(one, "import titans_runtime")
except interpreters.RunFailedError as error:
    print(type(error).__name__)
import titans_runtime as rt
rt.Session(sys.argv[1]).stream().feed([1])
"""


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 10), (3, 11)), reason="the module's name differs")
def test_a_subinterpreter_is_no_crash(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBINTERPRETER, str(bundle)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
