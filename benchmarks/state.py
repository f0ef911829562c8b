"""Measures state operations: save and restore compared with a plain copy of the same bytes, and marks and forks.

    python -m benchmarks.state build/test/mac-bytes.titans [MORE.titans ...] [--folder DISK] [-o RESULT.json]

All operations are interleaved within each round, so a slow phase of the disk affects all of them:

- `save`: Stream.save, which waits for the disk; `save_encrypted`: the same with a key.
- `write`: the bytes of that file written to a new file, then fsync. `copy`: a copy of the file, then fsync.
- `replace`: as `write`, then the new file is renamed and its folder synchronised, as replacing a file requires.
- `restore`: Session.restore, including the stream. `read`: the cached file read into memory. `create`: a new stream.
- `mark`, `rewind` and `fork`, in memory. `fork_and_step`: a fork that consumes a token. `step`: one token.
- `memory_copy`: a copy of the same bytes in memory.

--folder selects the disk. The default is the folder for temporary files.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import titans_runtime as rt
from benchmarks import report
from titans_export.bench.machine import QUIET, cores, others_busy

KEY = bytes(range(32))
TOKENS = 200


def write_plainly(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)


def replace_plainly(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    write_plainly(aside, content)
    aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def seconds(call: Callable[[], Any], clean: Callable[[], Any]) -> float:
    start = time.perf_counter()
    kept = call()
    elapsed = time.perf_counter() - start
    del kept
    clean()
    return elapsed


def measure(bundle: Path, folder: Path, rounds: int) -> dict[str, Any]:
    session = rt.Session(bundle, threads=cores())
    stream = session.stream()
    stream.feed(np.arange(TOKENS) % session.vocab_size, outputs="none")
    saved, aside = folder / "saved.tstate", folder / "aside"
    stream.save(saved)
    content = saved.read_bytes()
    array = np.frombuffer(content, np.uint8)
    marked = session.restore(saved)
    marked.mark()
    stepping = session.restore(saved)

    def nothing() -> None:
        pass

    def drop() -> None:
        aside.unlink(missing_ok=True)

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "save": (lambda: stream.save(aside), drop),
        "write": (lambda: write_plainly(aside, content), drop),
        "copy": (lambda: write_plainly(aside, saved.read_bytes()), drop),
        "replace": (lambda: replace_plainly(aside, content), drop),
        "save_encrypted": (lambda: stream.save(aside, KEY), drop),
        "restore": (lambda: session.restore(saved), nothing),
        "read": (saved.read_bytes, nothing),
        "create": (session.stream, nothing),
        "mark": (stream.mark, lambda: stream.unmark(stream.position)),
        "rewind": (lambda: marked.rewind(TOKENS), nothing),
        "memory_copy": (array.copy, nothing),
        "fork": (stream.fork, nothing),
        "fork_and_step": (lambda: fork_and_step(stream), nothing),
        "step": (lambda: stepping.step(1), nothing),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        order = list(calls)
        turned = turn % len(order)  # rotates the order, so that no call always follows the same one
        for name in order[turned:] + order[:turned]:
            call, clean = calls[name]
            elapsed = seconds(call, clean)
            if turn >= 2:  # the first two are warm-up
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bundle": bundle.name,
        "state_bytes": len(content),
        "rounds": rounds,
        "milliseconds": {
            name: {"median": 1e3 * median[name], "fastest": 1e3 * min(values), "slowest": 1e3 * max(values)}
            for name, values in times.items()
        },
        # Above 1: faster than the comparison.
        "save_over_write": median["write"] / median["save"],
        "save_over_copy": median["copy"] / median["save"],
        "save_over_replace": median["replace"] / median["save"],
        "save_encrypted_over_write": median["write"] / median["save_encrypted"],
        "restore_over_copy": median["copy"] / median["restore"],
        "restore_over_read": median["read"] / median["restore"],
    }


def fork_and_step(stream: rt.Stream) -> rt.Stream:
    twin = stream.fork()
    twin.step(1)
    return twin


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder for the files, on the disk to measure.",
)
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(3))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False))
def main(bundles: tuple[Path, ...], folder: Path | None, rounds: int, output: Path | None) -> None:
    busy = others_busy()
    if busy > QUIET:
        click.echo(f"others keep {busy:.0%} of the machine busy: these numbers say little", err=True)
    measured = []
    for bundle in bundles:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = measure(bundle, Path(place), rounds)
        measured.append(found)
        click.echo(f"{found['bundle']}: {found['state_bytes'] / 1e6:.2f} MB")
        for name, value in found["milliseconds"].items():
            click.echo(f"  {name:16} {value['median']:9.3f} ms   ({value['fastest']:.3f} to {value['slowest']:.3f})")
        for name in (
            "save_over_write",
            "save_over_copy",
            "save_over_replace",
            "restore_over_copy",
            "restore_over_read",
        ):
            click.echo(f"  {name:24} {found[name]:.2f}")
    if output is not None:
        result = {
            "what": "saving and restoring streams beside plain copies of the same bytes, side by side",
            **report.provenance(),
            "others_busy": busy,
            "bundles": measured,
        }
        report.write(output, result)


if __name__ == "__main__":
    main()
