"""Finds odd lines in a log: a model reads every line, and those that surprise it far more than usual are printed.

    python examples/watch_log.py mac.titans --state app.tstate < app.log
    python examples/watch_log.py mac.titans --state app.tstate --follow app.log

A line's surprise is -ln p per byte of it, given every line before. How usual that is, is told by a robust z-score: its
distance from the median of the lines before, in units of their median absolute deviation. The stream learns from each
line, so that what happens every day surprises less and less, as far as the model can learn it.

`--state` keeps what has been learned, and beside it in a .json the recent surprises and how far `--follow` has read:
started again, the watcher goes on where it was. What it finds goes to stdout, one line each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

import titans_runtime as rt
from titans_export.errors import TitansError
from titans_export.tokenizer import open_tokenizer

LONGEST = 4096  # bytes; what is longer counts as several lines
SAVE_EVERY = 60.0  # seconds, so that even a power cut costs no more
POLL = 0.5  # seconds between looks at a file that does not grow


class Usual:
    """How surprising lines have been lately, and how far from that a line is."""

    def __init__(self, scores: list[float], window: int, warm_up: int) -> None:
        self.scores: deque[float] = deque(scores, maxlen=window)
        self.warm_up = warm_up

    def judge(self, score: float) -> float | None:
        """The robust z-score of a line against those before it, None while there are too few of them."""
        z = None
        if len(self.scores) >= self.warm_up:
            before = np.array(self.scores)
            median = np.median(before)
            spread = 1.4826 * np.median(np.abs(before - median))  # of a normal distribution: its standard deviation
            z = float((score - median) / max(spread, 0.01))
        self.scores.append(score)
        return z


class Watcher:
    """A stream that reads lines, and what it has seen of them."""

    def __init__(self, bundle: Path, state: Path | None, window: int, warm_up: int) -> None:
        session = rt.Session(bundle)
        self.tokenizer = open_tokenizer(session.info["tokenizer"], bundle)
        self.state, self.saved_at = state, time.monotonic()
        self.lines, self.offset, self.inode, scores = 0, 0, 0, []
        if state is not None and state.exists():
            self.stream = session.restore(state)
            if self._notes(state).exists():
                notes = json.loads(self._notes(state).read_text())
                self.lines, self.offset, self.inode, scores = (notes[k] for k in ("lines", "offset", "inode", "scores"))
        else:
            self.stream = session.stream()
        self.usual = Usual(scores, window, warm_up)

    def read(self, line: bytes) -> tuple[float, float | None]:
        """Learns from a line. Returns its surprise in nats per byte, and its z-score; blank lines have none."""
        score = -math.fsum(self.stream.score(self.tokenizer.encode(line))) / len(line)
        self.lines += 1
        self.offset += len(line)
        return score, self.usual.judge(score) if line.strip() else None

    def save(self) -> None:
        """The stream, and then what belongs to it: stopped between the two, it reads some lines a second time."""
        self.saved_at = time.monotonic()
        if self.state is None:
            return
        self.stream.save(self.state)
        notes = {"lines": self.lines, "offset": self.offset, "inode": self.inode, "scores": list(self.usual.scores)}
        aside = self._notes(self.state).with_suffix(".json.new")
        aside.write_text(json.dumps(notes))
        aside.replace(self._notes(self.state))

    def follow(self, path: Path) -> Iterator[bytes]:
        """The lines of a file that grows, from where the last run ended; a file that is replaced is read anew."""
        while True:
            with path.open("rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self.inode or now.st_size < self.offset:
                    self.inode, self.offset = now.st_ino, 0
                file.seek(self.offset)
                while True:
                    line = file.readline(LONGEST)
                    if line.endswith(b"\n") or len(line) == LONGEST:
                        yield line
                    elif self._replaced(path):
                        break
                    else:
                        time.sleep(POLL)
                        file.seek(self.offset)  # a line that is still being written is read once it is whole
            while not path.exists():
                time.sleep(POLL)

    def _replaced(self, path: Path) -> bool:
        try:
            now = path.stat()
        except FileNotFoundError:
            return True
        return now.st_ino != self.inode or now.st_size < self.offset

    @staticmethod
    def _notes(state: Path) -> Path:
        return state.with_name(state.name + ".json")


def watch(watcher: Watcher, lines: Iterator[bytes], threshold: float) -> int:
    """Prints the lines beyond the threshold, and returns how many they were."""
    found = 0
    for line in lines:
        score, z = watcher.read(line)
        if z is not None and z > threshold:
            found += 1
            print(f"line {watcher.lines}  z {z:.1f}  {score:.2f} nats/byte  {_printable(line)}", flush=True)
        if time.monotonic() > watcher.saved_at + SAVE_EVERY:
            watcher.save()
    return found


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LONGEST):
        yield line


def _printable(line: bytes) -> str:
    """A line without what could change the terminal that it is shown on."""
    return "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace").strip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Finds odd lines in a log.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--follow", type=Path, metavar="FILE", help="read this file as it grows, not stdin")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what has been learned in this file")
    parser.add_argument("--threshold", type=float, default=6.0, help="z-score from which a line is odd (6)")
    parser.add_argument("--window", type=int, default=500, help="lines that say what is usual (500)")
    parser.add_argument("--warm-up", type=int, default=50, help="lines before the first is judged (50)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))  # sys.exit passes through `finally`
    try:
        watcher = Watcher(options.bundle, options.state, options.window, options.warm_up)
        lines = watcher.follow(options.follow) if options.follow else _lines(sys.stdin.buffer)
        try:
            watch(watcher, lines, options.threshold)
        except KeyboardInterrupt:
            pass
        finally:
            watcher.save()
    except (rt.Error, TitansError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
