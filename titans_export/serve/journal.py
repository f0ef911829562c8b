"""The journal of a stream: a chain of logs. docs/serving.md describes files and recovery.

The first record of a log is the base: a snapshot's file, and everything that replies depend on. Each call adds one
record. A compaction writes a new log and names it in a last record of the old one, `next`. That record commits it: a
server that still writes to the old log is refused, because the log has gone on.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DamagedLog, Fenced, ServeError, store_error
from .seal import Seal
from .store import End, Store

Record = dict[str, Any]
ANCHOR = f"log-{0:08d}"
_ATTEMPTS = 8


@dataclass(frozen=True)
class Place:
    """Where a stream lies in a store."""

    store: Store
    seal: Seal
    owner: str
    name: str

    @property
    def folder(self) -> str:
        """The stream's folder."""
        return f"streams/{self.owner}/{self.name}"

    def path(self, file: str) -> str:
        """The path of one of its files."""
        return f"{self.folder}/{file}"


class Journal:
    """A stream's journal as this process has read it. One thread at a time uses it."""

    def __init__(self, place: Place, log: str, end: End, base: Record, records: list[Record]) -> None:
        self.place, self.log, self.end, self.base, self.records = place, log, end, base, records

    @property
    def last(self) -> Record:
        """The newest record."""
        return self.records[-1] if self.records else self.base

    @property
    def number(self) -> int:
        """The number of the log in the chain."""
        return _number(self.log)

    def append(self, record: Record) -> None:
        """Adds a record, durable when this returns. Raises Fenced, OSError."""
        self.end = self.place.store.append(
            self.place.path(self.log), self.end, _sealed(self.place, self.log, self.end.records, record)
        )
        self.records.append(record)

    def new_tag(self) -> str:
        """A new name for the files of the next log."""
        return f"{self.number + 1:08d}-{secrets.token_hex(4)}"

    def compact(self, tag: str, base: Record, keep: int) -> None:
        """Continues in a new log that begins with `base`, and removes what nothing needs. Raises Fenced, OSError."""
        log = f"log-{tag}"
        end = self.place.store.create_log(self.place.path(log), _sealed(self.place, log, 0, base))
        self.append({"kind": "next", "log": log})
        self.log, self.end, self.base, self.records = log, end, base, []
        self.clean(keep)

    def bury(self, tombstone: Record) -> None:
        """Deletes the stream, and what was kept of it. Raises Fenced, OSError.

        Twice, because the log before the newest one is kept, and it must not hold text.
        """
        self.compact(self.new_tag(), {**tombstone, "step": 1}, keep=0)
        self.compact(self.new_tag(), {**tombstone, "step": 2}, keep=0)

    def clean(self, keep: int) -> None:
        """Removes what is not needed: snapshots but for `keep` older ones, and logs but for the one before this.

        That log names this one, which is how readers find it. The anchor makes the creation of a stream exclusive. A
        failure leaves files for later.
        """
        marks = {mark["file"] for mark in self.base.get("marks", ())}
        tag = self.log.partition("-")[2]
        try:
            for name in self.place.store.names(self.place.folder):
                number = _number(name)
                beside = number == self.number and tag not in name and not name.startswith("mark-")
                oldest = self.number - (1 if name.startswith("log-") else keep)
                if beside or (0 < number < oldest and name not in marks):
                    self.place.store.remove(self.place.path(name))
        except OSError:
            pass


def create_journal(place: Place, base: Record, write: Callable[[Path], None] | None = None) -> Journal:
    """The journal of a new stream. `write` saves its state. Raises FileExistsError, Fenced, OSError."""
    deleted = {**base, "deleted": True, "state": None, "marks": [], "replies": []}
    try:
        end = place.store.create_log(place.path(ANCHOR), _sealed(place, ANCHOR, 0, deleted))
        journal = Journal(place, ANCHOR, end, deleted, [])
    except FileExistsError:
        found = _read(place)
        if found is None:
            raise Fenced(place.folder) from None
        if not found.base.get("deleted"):
            raise
        journal = found
    tag = journal.new_tag()
    base = {**base, "epoch": journal.base["epoch"] + 1}
    if write is not None:
        base["state"] = f"state-{tag}.tstate"
        place.store.save(place.path(base["state"]), write)
    journal.compact(tag, base, keep=0)
    return journal


def read_journal(place: Place) -> Journal | None:
    """The newest log of a stream; None if there is no such stream. Raises ServeError for a damaged one, OSError."""
    journal = _read(place)
    return None if journal is None or journal.base.get("deleted") else journal


def finish_deletion(place: Place) -> None:
    """Removes what a deletion left behind that ended in its middle. Raises Fenced, OSError."""
    journal = _read(place)
    if journal is not None and journal.base.get("step") == 1:
        journal.compact(journal.new_tag(), {**journal.base, "step": 2}, keep=0)


def _read(place: Place) -> Journal | None:
    """The log that another one names as its successor, and that has none itself.

    A log that no other one names was left behind by a crash or by a server that was refused: it was never committed.
    """
    for _ in range(_ATTEMPTS):
        logs = [name for name in place.store.names(place.folder) if name.startswith("log-")]
        if not logs:
            return None
        journals, named = [], {ANCHOR}
        for log in logs:
            try:
                journal = _read_log(place, log)
            except FileNotFoundError:  # removed meanwhile
                continue
            if journal.last["kind"] == "next":
                named.add(journal.last["log"])
            else:
                journals.append(journal)
        newest = [journal for journal in journals if journal.log in named]
        if newest:
            return max(newest, key=lambda journal: journal.number)
    raise store_error(f"the logs of a stream change faster than they are read, or some are missing: {place.folder}")


def _read_log(place: Place, log: str) -> Journal:
    context = place.path(log)
    try:
        payloads, end = place.store.read_log(context)
        records = [
            json.loads(place.seal.open(place.owner, f"{context}#{index}", payload))
            for index, payload in enumerate(payloads)
        ]
    except DamagedLog as error:
        raise _damaged(place, log, str(error)) from None
    except ValueError:
        raise _damaged(place, log, "a record is not JSON") from None
    if not records or records[0].get("kind") != "base":
        raise _damaged(place, log, "no base record")
    return Journal(place, log, end, records[0], records[1:])


def _sealed(place: Place, log: str, index: int, record: Record) -> bytes:
    payload = json.dumps(record, separators=(",", ":")).encode()
    return place.seal.seal(place.owner, f"{place.path(log)}#{index}", payload)


def _damaged(place: Place, log: str, problem: str) -> ServeError:
    fix = "restore an older copy of the stream's folder, or delete the stream"
    return ServeError(500, "E1213", "store", f"damaged log {place.path(log)}: {problem}", fix)


def _number(name: str) -> int:
    """The number in log-00000012-abcdef01, state-... or mark-...; -1 without one."""
    digits = name.partition("-")[2][:8]
    return int(digits) if digits.isdigit() else -1
