"""Demonstrates titans-export in four steps, with the two small models of examples/checkpoints.

    make demo                    or: .venv/bin/python examples/demo.py
    make demo TEXT=book.txt      the same with your own text

1. Exports a byte-level language model to a bundle. PyTorch is not needed after that.
2. Streams a long text through the C++ runtime. The memory learns while it reads, at constant size.
3. Continues a prompt, before and after reading the text.
4. Exports a second model and queries it for pairs that left its attention window long ago.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recall_task import CHANCE, make_episodes

import titans_runtime as rt

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 4096  # bytes per read
PROMPT = "The old man looked at him and said, "
PAIRS, FILLER, EPISODES = 32, 300, 10


def title(number: int, text: str) -> None:
    print(f"\n{number}. {text}\n", flush=True)


def fail(problem: str, fix: str) -> int:
    print(f"[demo] {problem}. Fix: {fix}", file=sys.stderr)
    return 1


class Progress:
    """Progress of a long step: one line that is overwritten on a terminal, otherwise a line every ten seconds."""

    def __init__(self, label: str) -> None:
        self.label, self.started, self.shown = label, time.monotonic(), 0.0
        self.terminal = sys.stdout.isatty()

    def show(self, done: float) -> None:
        """Shows that this share, of 1, is done."""
        seconds = time.monotonic() - self.started
        left = f", {seconds / done - seconds:.0f} s left" if 0 < done < 1 else ""
        text = f"   {self.label}: {done:4.0%} after {seconds:.0f} s{left}"
        if self.terminal:
            print(f"\r{text:<79}", end="\r" if done < 1 else f"\r{'':<79}\r", flush=True)
        elif seconds >= self.shown + 10:
            self.shown = seconds
            print(text, flush=True)


def export(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Exports with the command line, as a user would. Returns the report."""
    program = Path(sys.executable).with_name("titans-export")
    arguments = ["export", shorten(checkpoint), "-o", shorten(bundle), "--chunks-per-call", "1", "--overwrite"]
    print(f"   $ titans-export {shlex.join(arguments)}", flush=True)
    done = subprocess.run([program, *arguments, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    print(
        f"\n   {report['parameters']:,} parameters, variant {report['variant'].upper()}. The bundle reproduces PyTorch:"
    )
    print(
        f"   largest difference of any logit {report['max_abs_error']:.1e} over {report['positions']:,} positions"
        f" (allowed: {report['tolerance']:.0e})."
    )
    return report


def shorten(path: Path) -> str:
    """The path relative to the repository, if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@dataclass
class Reading:
    """Results of a stream that read a text."""

    stream: rt.Stream
    state_bytes_before: int
    consumed: int = 0
    nats: float = 0.0
    seconds: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.consumed

    def run(self, text: bytes, stop: threading.Event) -> None:
        """Reads the text to its end, or until `stop` is set."""
        for start in range(0, len(text), BLOCK):
            if stop.is_set():
                return
            block = text[start : start + BLOCK]
            began = time.perf_counter()
            self.nats -= math.fsum(self.stream.score(block))
            self.seconds += time.perf_counter() - began
            self.consumed += len(block)


def read(session: rt.Session, text: bytes) -> tuple[Reading, Reading]:
    """Reads the text with two parallel streams. One learns and the other is frozen."""
    learning, frozen = (Reading(s, s.state_bytes) for s in (session.stream(), session.stream()))
    frozen.stream.freeze()
    stop, progress = threading.Event(), Progress("reading")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(reading.run, text, stop) for reading in (learning, frozen)]
        try:
            while wait(jobs, timeout=0.5).not_done:
                progress.show((learning.consumed + frozen.consumed) / (2 * len(text) + 1))
            progress.show(1)
            for job in jobs:
                job.result()
        finally:
            stop.set()
    return learning, frozen


def show_reading(learning: Reading, frozen: Reading) -> None:
    print(f"   {'':<18}{'bits per byte':>14}{'bytes per second':>19}{'state at start':>17}{'at end':>13}")
    for name, reading in (("memory learning", learning), ("memory frozen", frozen)):
        rate = reading.consumed / reading.seconds
        sizes = f"{reading.state_bytes_before:>15,} B{reading.stream.state_bytes:>11,} B"
        print(f"   {name:<18}{reading.bits_per_byte:>14.3f}{rate:>19,.0f}{sizes}")
    print("\n   The state is all that a stream keeps. Each of the two streams had one core.")


def write_on(stream: rt.Stream, prompt: str, count: int = 240) -> None:
    """Continues the prompt, and prints each byte as it is sampled."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stream.feed(prompt.encode(), outputs="none")
    print(f"   {prompt}", end="", flush=True)
    column = 3 + len(prompt)
    for token in stream.generate(max_tokens=count, temperature=0.7, top_p=0.95, seed=1):
        for character in decoder.decode(bytes([token])):
            if character == "\n" or (character == " " and column > 90):
                print("\n   ", end="", flush=True)
                column = 3
            elif character.isprintable():
                print(character, end="", flush=True)
                column += 1
    print(" ...\n")


def recall(session: rt.Session, learn: bool) -> tuple[float, list[tuple[int, int, int]]]:
    """Accuracy over all episodes, and (key, right value, answer) for the first episode's questions."""
    stream = session.stream()
    if not learn:
        stream.freeze()
    right = 0
    shown: list[tuple[int, int, int]] = []
    progress = Progress("asking")
    for index in range(EPISODES):
        episode = make_episodes(1, PAIRS, FILLER, seed=[2026, index])
        stream.reset()
        logits = stream.feed(episode.tokens[0])
        assert logits is not None
        answers = logits[episode.queries].argmax(-1)
        right += int(np.sum(answers == episode.answers[0]))
        if not shown:
            keys = episode.tokens[0][episode.queries]
            shown = [(int(k), int(v), int(a)) for k, v, a in zip(keys, episode.answers[0], answers, strict=True)]
        progress.show((index + 1) / EPISODES)
    return right / (EPISODES * PAIRS), shown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Demonstrates titans-export in four steps.")
    parser.add_argument("--text", type=Path, help="text to read (default: Python's topics reference)")
    parser.add_argument(
        "--checkpoints", type=Path, default=ROOT / "examples" / "checkpoints", help="folder with the checkpoints"
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "demo", help="folder for the bundles")
    options = parser.parse_args(arguments)
    if options.text is None:
        from pydoc_data import topics

        options.text = Path(topics.__file__)
    try:
        text = options.text.read_bytes()
    except OSError as error:
        return fail(f"cannot read {options.text}: {error.strerror or error}", "give another file with TEXT=")
    if not text:
        return fail(f"empty file: {options.text}", "give another file with TEXT=")
    for name in ("mac-bytes", "recall"):
        if not (options.checkpoints / name).is_dir():
            return fail(f"no such model: {options.checkpoints / name}", "check out the repository again")
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    print("Titans models have a memory whose weights go on learning while the model runs.")
    print("This takes one out of PyTorch, and runs it in a small C++ library.")

    title(1, "A trained model becomes a bundle")
    bundle = options.output / "mac-bytes.titans"
    export(options.checkpoints / "mac-bytes", bundle)

    title(2, f"The runtime reads {options.text.name}, {len(text):,} bytes in one stream")
    session = rt.Session(bundle, threads=1)
    learning, frozen = read(session, text)
    show_reading(learning, frozen)

    title(3, "It continues a prompt, one byte after another")
    print("   From a fresh memory:\n")
    write_on(session.stream(), PROMPT)
    print(f"   From the memory that has read {options.text.name}:\n")
    write_on(learning.stream, PROMPT)

    title(4, "Only the memory can know this")
    bundle = options.output / "recall.titans"
    export(options.checkpoints / "recall", bundle)
    config = json.loads((bundle / "manifest.json").read_text())["model"]["config"]
    attention = f"attention sees {config['window']} tokens" if config["window"] else "there is no attention"
    print(
        f"\n   It is told {PAIRS} random pairs, reads {FILLER} tokens of noise and is asked for each pair; {attention}."
    )
    session = rt.Session(bundle)
    accuracy, shown = recall(session, learn=True)
    lines = [f"{key} -> {value} {'(right)' if value == answer else f'(said {answer})'}" for key, value, answer in shown]
    print(f"   Its first answers: {',  '.join(lines[:4])}\n")
    print(f"   {'memory learning':<18}{accuracy:>7.1%} right of {EPISODES * PAIRS} questions")
    print(f"   {'memory frozen':<18}{recall(session, learn=False)[0]:>7.1%}")
    print(f"   {'guessing':<18}{CHANCE:>7.1%}")

    print(f"\nDone in {time.monotonic() - began:.0f} s. The bundles are in {shorten(options.output)}/. Go on with:\n")
    print(f"   .venv/bin/titans-export inspect {shorten(options.output / 'mac-bytes.titans')}")
    print(f"   .venv/bin/titans-export run {shorten(options.output / 'mac-bytes.titans')} --prompt 'Once upon'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
