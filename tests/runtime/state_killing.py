"""Kills processes that save a stream, and looks at what they leave.

Run by test_state.py with file_calls.c preloaded, or alone for many random kills:

    python tests/runtime/state_killing.py BUNDLE --kills 500

The parent opens the bundle and makes a stream for each of many positions. Children are forks of the process: they open
the bundle themselves, restore these streams, and save them until they are killed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import titans_runtime as rt

OFF, COUNT, KILL, KILL_HALFWAY, FAIL, SHORT = range(6)
POSITIONS = 24
KEY = bytes(range(32))


class Streams:
    """A stream at each of many positions, and what is right after it."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.session = rt.Session(bundle, threads=1)
        self.stream = self.session.stream()
        tokens = np.random.default_rng(5).integers(0, self.session.vocab_size, POSITIONS + 1)
        self.twins: list[rt.Stream] = []
        self.last_logits = []
        for token in tokens[:-1]:
            self.last_logits.append(self.stream.step(int(token)))
            self.twins.append(self.stream.fork())
        self.probe = int(tokens[-1])
        for index, twin in enumerate(self.twins):
            twin.save(folder / f"{index}.tstate")
        self.following = [twin.fork().step(self.probe) for twin in self.twins]

    def own(self, *indices: int) -> list[rt.Stream]:
        """Some of the streams, for a child of a fork."""
        session = rt.Session(self.bundle, threads=1)
        return [session.restore(self.folder / f"{index}.tstate") for index in indices]

    def check(self, path: Path, key: bytes | None) -> int:
        """That the file is one of the saved states, bit by bit. Its position."""
        stream = self.session.restore(path, key)
        position = stream.position
        assert 1 <= position <= POSITIONS, position
        np.testing.assert_array_equal(stream.feed([], outputs="last"), self.last_logits[position - 1])
        np.testing.assert_array_equal(stream.step(self.probe), self.following[position - 1])
        return position


def in_child(work: Callable[[], None]) -> int:
    """Runs it in a fork and returns how that ended: minus the signal, 0, or 1 where it threw."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_every_call(streams: Streams, folder: Path, mode: int, key: bytes | None) -> dict[str, Any]:
    """One child for each call that changes a file, killed there. An old state is there before each."""
    calls = ctypes.CDLL(None)
    calls.file_calls_kinds.restype = ctypes.c_char_p
    path = folder / "user.tstate"
    kept: list[int] = []
    leftovers = 0
    for at in range(200):

        def save_old() -> None:
            streams.own(2)[0].save(path, key)

        def save_new(at: int = at) -> None:
            [stream] = streams.own(16)
            calls.file_calls_arm(mode, at, 0)
            stream.save(path, key)

        assert in_child(save_old) == 0
        assert os.listdir(folder) == [path.name], "what a killed process left is removed by the next save"
        code = in_child(save_new)
        kept.append(streams.check(path, key))
        assert kept[-1] in (3, 17)
        others = [name for name in os.listdir(folder) if name != path.name]
        assert others in ([], [path.name + ".tmp"])
        leftovers += len(others)
        if code == 0:
            assert kept[-1] == 17
            break
        assert code == -signal.SIGKILL
    return {"kept": kept[:-1], "leftovers": leftovers}


def fail_at_every_call(streams: Streams, folder: Path) -> dict[str, Any]:
    """The same with errors in the place of kills: the save fails and says why, or the error did no harm."""
    calls = ctypes.CDLL(None)
    calls.file_calls_kinds.restype = ctypes.c_char_p
    path, outcomes = folder / "user.tstate", []
    for error in (errno.ENOSPC, errno.EIO, errno.EINTR, 0):
        for at in range(200):
            calls.file_calls_arm(OFF, 0, 0)
            old = streams.session.stream()
            old.feed([0, 1, 2], outputs="none")
            old.save(path)
            before = path.read_bytes()
            calls.file_calls_arm(FAIL if error else SHORT, at, error)
            try:
                streams.stream.save(path)
                failure = ""
            except rt.Error as caught:
                failure = str(caught)
            kinds = calls.file_calls_kinds().decode()
            calls.file_calls_arm(OFF, 0, 0)
            if at >= len(kinds):
                break
            # After the rename the new state is there, and only that it may not survive a loss of power is told.
            new = path.read_bytes() != before
            assert new == (not failure or "r" in kinds[:at]), (kinds, at, failure)
            if new:
                assert streams.check(path, None) == POSITIONS
            assert os.listdir(folder) == [path.name]
            outcomes.append((error, kinds[at], failure))
    calls.file_calls_arm(COUNT, 0, 0)
    streams.stream.save(path)
    kinds = calls.file_calls_kinds().decode()
    calls.file_calls_arm(OFF, 0, 0)
    return {"outcomes": outcomes, "kinds": kinds}


def exceed_the_limit(streams: Streams, folder: Path) -> dict[str, Any]:
    """A file system that takes no more: the kernel's own limit on files, which a fork has for itself."""
    path, told = folder / "user.tstate", folder / "told"
    streams.stream.save(path)
    before = path.read_bytes()

    def save() -> None:
        told.touch()
        message = ""
        [stream] = streams.own(POSITIONS - 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        try:
            stream.save(path)
        except rt.Error as error:
            message = str(error)
        told.write_text(message)

    assert in_child(save) == 0
    message = told.read_text()
    told.unlink()
    assert path.read_bytes() == before and os.listdir(folder) == [path.name]
    return {"message": message}


def kill_at_random(streams: Streams, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Children that save on and on, each from where the file is, killed at any time. What a save has confirmed is never
    lost."""
    rng, path = random.Random(seed), folder / "user.tstate"
    positions, saves, halves = set(), 0, 0

    def save_on(position: int, confirm: int, key: bytes | None) -> None:
        twins = streams.own(*range(POSITIONS))
        os.write(confirm, b"\0")  # ready
        while True:
            position = position % POSITIONS + 1
            twins[position - 1].save(path, key)
            os.write(confirm, bytes([position]))

    position = 1
    for kill in range(kills):
        key = KEY if kill % 3 == 2 else None
        start = time.monotonic()
        streams.twins[position - 1].save(path, key)
        took = time.monotonic() - start
        reading, confirm = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                save_on(position, confirm, key)
            finally:
                os._exit(1)
        os.close(confirm)
        assert os.read(reading, 1) == b"\0"
        time.sleep(rng.uniform(0, 4 * took))  # within the first few saves, however slow this disk is
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        confirmed = b""
        while chunk := os.read(reading, 65536):
            confirmed += chunk
        os.close(reading)
        last = confirmed[-1] if confirmed else position
        saves += len(confirmed)
        position = streams.check(path, key)
        # The save that was running is there whole or not at all.
        assert position in (last, last % POSITIONS + 1), (position, last)
        others = [name for name in os.listdir(folder) if name != path.name]
        assert others in ([], [path.name + ".tmp"])
        halves += len(others)
        positions.add(position)
    return {"kills": kills, "saves": saves, "leftovers": halves, "positions": len(positions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--calls", action="store_true", help="at every call; needs file_calls.c preloaded")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}

    def folder() -> Path:
        return Path(tempfile.mkdtemp(dir=root))

    with tempfile.TemporaryDirectory() as root:
        streams = Streams(arguments.bundle, folder())
        if arguments.calls:
            result["kill"] = kill_at_every_call(streams, folder(), KILL, None)
            result["halfway"] = kill_at_every_call(streams, folder(), KILL_HALFWAY, None)
            result["encrypted"] = kill_at_every_call(streams, folder(), KILL_HALFWAY, KEY)
            result["fail"] = fail_at_every_call(streams, folder())
            result["limit"] = exceed_the_limit(streams, folder())
        result["random"] = kill_at_random(streams, folder(), arguments.kills)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
