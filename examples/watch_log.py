"""Finds unusual lines in a log: a model reads every line and prints those that are far more surprising than usual.

    python examples/watch_log.py mac.titans --state app.tstate < app.log
    python examples/watch_log.py mac.titans --state app.tstate --follow app.log

A line's surprise is -ln p per byte, given all earlier lines. A robust z-score compares it with earlier lines: its
distance from their median, in units of their median absolute deviation. The stream learns from each line, so recurring
events become less surprising, as far as the model can learn them.

`--state` keeps the memory, and a .json file beside it keeps the recent surprises and the position of `--follow`. A
restart continues from there. Findings go to stdout, one per line.
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

LONGEST = 4096  # bytes; longer lines are split
SAVE_EVERY = 60.0  # seconds; limits the loss at a power cut
POLL = 0.5  # seconds between reads of a file that does not grow


class Usual:
    """Recent surprises of lines, and the distance of a new line from them."""

    def __init__(self, scores: list[float], window: int, warm_up: int) -> None:
        self.scores: deque[float] = deque(scores, maxlen=window)
        self.warm_up = warm_up

    def judge(self, score: float) -> float | None:
        """The robust z-score of a line against earlier ones; None while there are too few."""
        z = None
        if len(self.scores) >= self.warm_up:
            before = np.array(self.scores)
            median = np.median(before)
            spread = 1.4826 * np.median(np.abs(before - median))  # the standard deviation, if normal
            z = float((score - median) / max(spread, 0.01))
        self.scores.append(score)
        return z


class Watcher:
    """A stream that reads lines, and its statistics."""

    def __init__(self, bundle: Path, state: Path | None, window: int, warm_up: int) -> None:
        session = rt.Session(bundle)
        self.tokenizer = open_tokenizer(session.info["tokenizer"], bundle, session.vocab_size, "replace")
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
        """Learns from a line. Returns its surprise in nats per byte and its z-score, None for blank lines."""
        score = -math.fsum(self.stream.score(self.tokenizer.encode(line))) / len(line)
        self.lines += 1
        self.offset += len(line)
        return score, self.usual.judge(score) if line.strip() else None

    def save(self) -> None:
        """Saves the stream, then its statistics. After an interruption between the two, some lines are read again."""
        self.saved_at = time.monotonic()
        if self.state is None:
            return
        self.stream.save(self.state)
        notes = {"lines": self.lines, "offset": self.offset, "inode": self.inode, "scores": list(self.usual.scores)}
        aside = self._notes(self.state).with_suffix(".json.new")
        aside.write_text(json.dumps(notes))
        aside.replace(self._notes(self.state))

    def follow(self, path: Path) -> Iterator[bytes]:
        """Yields the lines of a growing file, from the last run's end. Reads a replaced file from its start."""
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
                        file.seek(self.offset)  # an incomplete line is read again later
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
    """Prints the lines beyond the threshold. Returns their number."""
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
    """A line without characters that could alter the terminal."""
    return "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace").strip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Finds unusual lines in a log.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--follow", type=Path, metavar="FILE", help="follow this file as it grows, not stdin")
    parser.add_argument("--state", type=Path, metavar="FILE", help="state file that keeps the memory")
    parser.add_argument("--threshold", type=float, default=6.0, help="minimum z-score of an unusual line (6)")
    parser.add_argument("--window", type=int, default=500, help="recent lines to compare with (500)")
    parser.add_argument("--warm-up", type=int, default=50, help="lines to read before the first finding (50)")
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
