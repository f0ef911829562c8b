"""Kills a server again and again while clients use it, and compares every stream with a session without a server.

    python -m benchmarks.serving mac.titans --kill --seconds 600 -o result.json

Clients feed and generate on named streams, repeat what was not answered, and sometimes repeat what was. At the end no
call may be lost or applied twice, and each stream's tensors must have the bits of an uninterrupted stream.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import titans_runtime as rt
from titans_export.client import Client, ClientError

BLOCK = 16


@dataclass
class Call:
    """An answered call: the blocks that its stream has read, and the position after it."""

    position: int
    blocks: list[list[int]]


@dataclass
class Journal:
    """What clients know of a run."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    seconds: list[float] = field(default_factory=list)
    repeated: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Served:
    """A server in a process of its own, on one port and one store for its whole life."""

    def __init__(self, bundle: Path, store: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._command = [
            sys.executable, "-m", "titans_export.cli", "serve", str(bundle), "--store", str(store),
            "--port", str(self.port), "--prompt-block", str(BLOCK), "--snapshot-calls", "8", "--resident-streams", "8",
        ]  # fmt: skip
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Starts it. Returns the seconds until it is ready."""
        started = time.monotonic()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log, stdout=log)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self._log.read_text()[-2000:]}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return time.monotonic() - started
            except OSError:
                time.sleep(0.02)

    def end(self, number: int) -> None:
        """Sends a signal and waits for the end."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(120)


def use(client: Client, names: list[str], stop: threading.Event, vocab: int, seed: int, journal: Journal) -> None:
    """One client: random calls on random streams."""
    rng = random.Random(seed)
    while not stop.is_set():
        name, key = rng.choice(names), str(uuid.uuid4())
        tokens = [rng.randrange(vocab) for _ in range(rng.randint(1, 3 * BLOCK))]
        generate = rng.random() < 0.5
        path = f"/v1/streams/{name}/{'generate' if generate else 'feed'}"
        body: dict[str, Any] = {"tokens": tokens, **({"max_tokens": rng.randint(1, 8)} if generate else {})}
        started = time.monotonic()
        try:
            reply = client.request("POST", path, body, key=key)
            seconds = time.monotonic() - started
            repeated = rng.random() < 0.2
            if repeated and client.request("POST", path, body, key=key) != reply:
                journal.wrong.append(f"a repeated call on {name} got another reply")
        except ClientError as error:
            journal.wrong.append(f"{name}: {error}")
            continue
        blocks = [tokens[at : at + BLOCK] for at in range(0, len(tokens), BLOCK)]
        blocks += [[token] for token in (reply["tokens"] if generate else [])]
        with journal.lock:
            journal.calls[name].append(Call(reply["position"], blocks))
            journal.seconds.append(seconds)
            journal.repeated += repeated


def compare(session: rt.Session, calls: list[Call], state: Path, folder: Path) -> dict[str, int]:
    """Tokens lost and doubled, and whether all tensors are equal (differing: their number)."""
    position = lost = doubled = 0
    with session.stream() as stream:
        for call in sorted(calls, key=lambda one: one.position):
            size = sum(map(len, call.blocks))
            gap = call.position - position - size
            doubled, lost = doubled + max(gap, 0), lost + max(-gap, 0)
            position = call.position
            for block in call.blocks:
                stream.feed(block, outputs="none")
        right = folder / "right.tstate"
        stream.save(right)
    found, expected = rt.read_state(state), rt.read_state(right)
    lost += max(0, position - found.position)
    doubled += max(0, found.position - position)
    names = expected.tensors.keys() | found.tensors.keys()
    differing = sum(
        not np.array_equal(expected.tensors.get(name, np.empty(0)), found.tensors.get(name, np.empty(0)))
        for name in names
    )
    return {"lost": lost, "doubled": doubled, "differing": differing}


def kill_test(
    bundle: Path, seconds: float, streams: int, clients: int, seed: int, pause: float, calls: int = 0
) -> dict[str, Any]:
    """Runs it. pause: the longest time between two kills, in seconds. calls: answered calls that it waits for."""
    rng, journal, stop = random.Random(seed), Journal(), threading.Event()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        served = Served(bundle, folder / "store", folder / "server.log")
        starts = [served.start()]
        try:
            client = Client(f"http://127.0.0.1:{served.port}", patience=600, timeout=120)
            names = [client.stream(f"s{number}").name for number in range(streams)]
            with rt.Session(bundle, threads=1) as session:
                vocab = session.vocab_size
                until = time.monotonic() + seconds
                threads = [
                    threading.Thread(target=use, args=(client, names, stop, vocab, seed + number, journal))
                    for number in range(1, clients + 1)
                ]
                for thread in threads:
                    thread.start()
                kills = 0
                while time.monotonic() < until or len(journal.seconds) < calls:
                    answered = len(journal.seconds)
                    time.sleep(rng.uniform(0.1, pause))
                    # A slow machine gets something done between two kills.
                    while len(journal.seconds) < answered + max(1, calls // 2) and not journal.wrong:
                        time.sleep(0.02)
                    served.end(signal.SIGKILL)
                    kills += 1
                    starts.append(served.start())
                    if journal.wrong:
                        break
                stop.set()
                for thread in threads:
                    thread.join()
                served.end(signal.SIGTERM)
                graceful = served.process.returncode if served.process else None
                starts.append(served.start())
                results = {}
                for name in names:
                    state = folder / "state.tstate"
                    state.write_bytes(client.content("GET", f"/v1/streams/{name}/state"))
                    results[name] = compare(session, journal.calls[name], state, folder)
        finally:
            stop.set()
            if served.process is not None and served.process.poll() is None:
                served.end(signal.SIGKILL)
        stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    ordered = sorted(journal.seconds)
    return {
        "bundle": bundle.name,
        "seconds": seconds,
        "kills": kills,
        "streams": streams,
        "clients": clients,
        "calls": len(ordered),
        "repeated_calls": journal.repeated,
        "tokens": sum(call.position for one in journal.calls.values() for call in sorted_last(one)),
        "lost_tokens": sum(one["lost"] for one in results.values()),
        "doubled_tokens": sum(one["doubled"] for one in results.values()),
        "streams_with_other_bits": sum(one["differing"] > 0 for one in results.values()),
        "wrong_answers": journal.wrong[:10],
        "graceful_exit_code": graceful,
        "start_seconds": statistics.median(starts),
        "call_p50_seconds": ordered[len(ordered) // 2] if ordered else None,
        "call_p99_seconds": ordered[len(ordered) * 99 // 100] if ordered else None,
        "stored_bytes_per_stream": stored // streams,
        "processors": os.cpu_count(),
    }


def sorted_last(calls: list[Call]) -> list[Call]:
    """The last call of a stream, alone in a list; empty without calls."""
    return sorted(calls, key=lambda one: one.position)[-1:]


def failed(result: dict[str, Any]) -> bool:
    """Whether a token was lost or doubled, bits differ, or an answer was wrong."""
    return bool(
        result["lost_tokens"]
        or result["doubled_tokens"]
        or result["streams_with_other_bits"]
        or result["wrong_answers"]
        or result["graceful_exit_code"] != 0
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--kill", action="store_true", help="run the kill test; there is no other one")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=15, help="longest time between two kills, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if not options.kill:
        parser.error("give --kill")
    result = kill_test(options.bundle, options.seconds, options.streams, options.clients, options.seed, options.pause)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(3 if failed(result) else 0)


if __name__ == "__main__":
    main()
