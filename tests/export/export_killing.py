"""Kills processes that export over a bundle, and looks at what they leave.

Run by test_export_killed.py, or alone for many kills:

    python tests/export/export_killing.py --kills 500

Children are forks of a process that has imported everything, so that a kill falls into an export and seldom into its
start. Two checkpoints take turns: what lies under the bundle's name must always be one of the two, whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import titans_runtime
from titans_export import files
from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans import save
from titans_export.exporting import export_checkpoint
from titans_export.model import MemoryConfig, ModelConfig, Titans

# Chunks of one token, so a single graph: the quickest to export.
SMALL = ModelConfig(
    variant="lmm", vocab_size=16, dim=8, layers=1, hidden=8, memory=MemoryConfig(heads=1, head_dim=4, chunk=1)
)


def content(bundle: Path) -> str:
    """A hash of all files and their names."""
    found = hashlib.sha256()
    for path in sorted(bundle.iterdir()):
        found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()


def export(checkpoint: Path, bundle: Path) -> None:
    export_checkpoint(checkpoint, bundle, overwrite=True, positions=4)


def export_in_fork(checkpoint: Path, bundle: Path) -> tuple[int, int]:
    """The child, and a pipe that gets a byte once all is written and is about to take its place."""
    reading, telling = os.pipe()
    pid = os.fork()
    if pid:
        os.close(telling)
        return pid, reading
    code, sync = 1, files._sync

    def tell_and_sync(path: Path) -> None:
        os.write(telling, b".")
        sync(path)

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        files._sync = tell_and_sync
        export(checkpoint, bundle)
        code = 0
    finally:
        os._exit(code)


def kill_at_random(work: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Every other kill falls late, where the new bundle takes the old one's place. Returns what was seen."""
    torch.set_num_threads(1)  # a fork has no other threads
    rng, checkpoints, whole = random.Random(seed), [], []
    for number in range(2):
        torch.manual_seed(number)
        checkpoints.append(work / f"{number}")
        save(Titans(SMALL), checkpoints[-1])
    folder = work / "bundles"
    folder.mkdir()
    bundle = folder / "user.titans"
    export(checkpoints[1], bundle)  # imports everything, so that forks need not
    took = placing = 0.0
    for checkpoint in checkpoints:
        start = time.monotonic()
        pid, reading = export_in_fork(checkpoint, bundle)
        os.read(reading, 1)
        written = time.monotonic()
        assert os.waitpid(pid, 0)[1] == 0
        os.close(reading)
        took, placing = time.monotonic() - start, time.monotonic() - written
        whole.append(content(bundle))
    assert whole[0] != whole[1]
    found = {"kills": 0, "finished": 0, "replaced": 0, "leftovers": 0}
    there = 1
    for kill in range(kills):
        pid, reading = export_in_fork(checkpoints[1 - there], bundle)
        if kill % 2:
            os.read(reading, 1)
            time.sleep(rng.uniform(0, placing))
        else:
            time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reading)
        assert code in (0, -signal.SIGKILL), code
        found["kills" if code else "finished"] += 1
        now = whole.index(content(bundle))  # one of the two, whole
        assert code or now != there, "an export that was finished is there"
        found["replaced"] += now != there
        there = now
        others = [path for path in folder.iterdir() if path != bundle]
        assert len(others) <= 1, "what a killed export left is removed by the next"
        found["leftovers"] += len(others)
    read_bundle(bundle)
    titans_runtime.Session(bundle).close()
    export(checkpoints[1 - there], bundle)
    assert content(bundle) == whole[1 - there]
    assert list(folder.iterdir()) == [bundle]
    return found | {"seconds": round(took, 3), "of_placing": round(placing, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(kill_at_random(Path(work), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
