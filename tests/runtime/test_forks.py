"""fork(): a child may exit, exec, or open sessions of its own, whatever its parent does; its parent's are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The parent forks while threads feed batches and save streams, with some streams spilled.
PROGRAM = """
import multiprocessing, os, signal, sys, threading, time
import numpy as np
import titans_runtime as rt

bundle, folder, threads, batch_threads, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
def open_session(budget=0):
    spill = dict(memory_budget=budget, spill_dir=folder) if budget else {}
    return rt.Session(bundle, threads=threads, batch_threads=batch_threads, **spill)

session = open_session()
bytes_of_one = session.stream().state_bytes
session.close()
session = open_session(6 * bytes_of_one)
streams = [session.stream() for _ in range(8)]
expected = session.stream().feed([1, 2, 3, 4, 5])
generation = streams[0].generate(None) if streams[0].feed([1]) is not None else None
session.feed_batch(streams, [[1, 2, 3]] * 8)
assert session.metrics().spilled > 0
going = True

def feed():
    mine = [session.stream() for _ in range(4)]
    while going:
        session.feed_batch(mine, [np.zeros(300, np.uint8)] * 4, "none")

def save():
    stream = session.stream()
    stream.feed([1, 2])
    while going:
        stream.save(folder + "/one.tstate")

def refused(call):
    try:
        call()
    except rt.Error as error:
        assert error.code == "TITANS-E0517" and "forked" in str(error), error
    else:
        raise AssertionError("no error")

def use_the_parents():
    for call in (session.stream, session.metrics, lambda: session.feed_batch(streams, [[1]] * 8),
                 lambda: session.step_batch(streams, [1] * 8), lambda: session.restore(folder + "/one.tstate"),
                 lambda: streams[0].feed([1, 2]), lambda: streams[0].step(1), streams[1].fork, streams[1].mark,
                 lambda: streams[1].save(folder + "/two.tstate"), streams[2].memory, streams[2].reset,
                 lambda: next(generation), lambda: streams[2].score([1]), lambda: streams[3].generate()):
        refused(call)
    streams[0].close()
    session.close()

def open_ones_own():
    for _ in range(2):
        with open_session(6 * bytes_of_one) as own:
            assert np.array_equal(own.stream().feed([1, 2, 3, 4, 5]), expected)
            made = [own.stream() for _ in range(8)]
            own.feed_batch(made, [[1, 2, 3]] * 8)
            made[0].save(folder + "/two.tstate")

def replace():
    os.execv(sys.executable, [sys.executable, "-c", "pass"])

workers = [threading.Thread(target=feed), threading.Thread(target=save)]
for worker in workers:
    worker.start()
for index in range(rounds):
    for action in (lambda: None, replace, use_the_parents, open_ones_own):
        child = os.fork()
        if child == 0:
            action()
            sys.exit(0)  # with all destructors
        end = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                raise AssertionError("a child hangs: " + repr(action))
            time.sleep(0.002)
        assert done[1] == 0, (action, done[1])
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, 2]) == [1, 2]
going = False
for worker in workers:
    worker.join()
assert np.array_equal(session.stream().feed([1, 2, 3, 4, 5]), expected)
session.feed_batch(streams, [[4]] * 8)
print("done")
"""


def _run(bundle: Path, folder: Path, *numbers: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(bundle), str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["one.tstate", "two.tstate"]


def test_children_of_a_process_with_sessions(bundle: Path, tmp_path: Path) -> None:
    _run(bundle, tmp_path, 2, 2, 2)


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("batch_threads", [1, 4])
def test_many_children(bundle: Path, tmp_path: Path, threads: int, batch_threads: int) -> None:
    _run(bundle, tmp_path, threads, batch_threads, 30)


CALLBACK = """
import os, sys
import titans_runtime as rt

stream = rt.Session(sys.argv[1], threads=2).stream()
children = []

def progress(done, total):
    if done == 12:
        children.append(os.fork())

try:
    stream.feed(range(15), "none", progress=progress)
except rt.Error as error:
    assert children == [0] and error.code == "TITANS-E0517", error
    sys.exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 9
assert stream.position == 15
"""


def test_a_progress_function_forks(bundle: Path) -> None:
    subprocess.run([sys.executable, "-c", CALLBACK, str(bundle)], check=True, timeout=60)
