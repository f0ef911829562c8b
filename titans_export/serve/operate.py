"""Streams of a store for operators: list, show, verify, compact and move, also while servers run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .config import Config, read_secret
from .errors import ConfigError, Fenced, ServeError
from .journal import Journal, Place, create_journal, read_journal
from .names import is_name
from .operations import part_size
from .seal import MARKER, Seal, open_seal
from .store import Store, open_store


class Shelf:
    """An existing store, and its seal."""

    def __init__(self, url: str, key_file: str = "", create: bool = False) -> None:
        """Raises ConfigError, OSError."""
        if not create and "://" not in url and not Path(url, MARKER).is_file():
            raise ConfigError("E1220", "streams", f"{url} is not a store of streams", "give the --store of a server")
        self.store: Store = open_store(url)
        self.seal: Seal = open_seal(self.store, read_secret(key_file) if key_file else None)

    def place(self, stream: str) -> Place:
        """The place of OWNER/NAME. Raises ServeError."""
        owner, _, name = stream.rpartition("/")
        if not is_name(name) or not is_name(owner or "default"):
            raise ServeError(400, "E1203", "streams", f"invalid stream {stream!r}", "give OWNER/NAME")
        return Place(self.store, self.seal, owner or "default", name)

    def places(self) -> Iterator[Place]:
        """All streams, deleted ones too."""
        for owner in self.store.names("streams"):
            for name in self.store.names(f"streams/{owner}"):
                yield Place(self.store, self.seal, owner, name)


def find(place: Place) -> Journal:
    """The journal of a stream. Raises ServeError."""
    journal = read_journal(place)
    if journal is None:
        problem = f"no stream {place.owner}/{place.name} in {place.store.url}"
        raise ServeError(404, "E1207", "streams", problem, "see titans-export streams list STORE")
    return journal


def describe(journal: Journal) -> dict[str, Any]:
    """What the journal shows of a stream. Text and tokens are left out."""
    from .streams import summary

    place, base = journal.place, journal.base
    sizes = {name: place.store.size(place.path(name)) for name in place.store.names(place.folder)}
    return {
        "owner": place.owner,
        **summary(journal),
        "model": base["model"]["name"],
        "snapshot": base["state"],
        "snapshot_position": base["position"],
        "marks": [mark["position"] for mark in base["marks"]],
        "journalled_tokens": sum(part_size(part) for record in journal.records for part in record.get("parts", ())),
        "replies": len(base["replies"]) + sum("key" in record for record in journal.records),
        "bytes": sum(sizes.values()),
        "files": len(sizes),
    }


def verify(place: Place, bundle: Path | None) -> dict[str, Any]:
    """Reads every record and, with the bundle, restores and replays the stream. Raises ServeError, rt.Error."""
    journal = find(place)
    for file in [journal.base["state"], *(mark["file"] for mark in journal.base["marks"])]:
        if file is not None and file not in place.store.names(place.folder):
            fix = "restore an older copy of the stream's folder"
            raise ServeError(500, "E1213", "store", f"missing file {place.path(file)}", fix)
    found = {"owner": place.owner, "name": place.name, "position": journal.last["position"], "replayed": False}
    if bundle is not None:
        restore(place, bundle)
        found["replayed"] = True
    return found


def restore(place: Place, bundle: Path) -> int:
    """Restores and replays a stream. Returns the position."""
    from .server import Server

    async def run() -> int:
        server = Server(bundle, Config(threads=0), place.store, place.seal)
        try:
            return int((await server.streams.info(place.owner, place.name))["position"])
        finally:
            server.session.close()

    return asyncio.run(run())


def compact(place: Place, bundle: Path) -> dict[str, Any]:
    """Writes a snapshot and removes everything older. Raises ServeError, rt.Error, OSError."""
    from .server import Server

    before = describe(find(place))["bytes"]

    async def run() -> dict[str, Any]:
        server = Server(bundle, Config(threads=0, keep_snapshots=0), place.store, place.seal)
        try:
            return await server.streams.snapshot(place.owner, place.name)
        finally:
            server.session.close()

    asyncio.run(run())
    after = describe(find(place))
    return {"owner": place.owner, "name": place.name, "bytes_before": before, "bytes": after["bytes"]}


def move(source: Place, target: Place) -> dict[str, Any]:
    """Moves a stream to another place, with its replies and marks. A call meanwhile is refused, never lost.

    The copy is complete before the source is deleted; the source is deleted only if nothing was added meanwhile.
    Raises ServeError, OSError.
    """
    journal = find(source)
    base = journal.base
    if read_journal(target) is not None:
        raise ServeError(409, "E1208", "streams", f"{target.owner}/{target.name} exists", "choose another name")
    files = [mark["file"] for mark in base["marks"]]
    files += [record["mark"]["file"] for record in journal.records if record["op"] == "mark"]
    for file in sorted(set(files)):
        _copy(source, target, file)
    write = None
    if base["state"] is not None:

        def write(path: Path) -> None:
            _write(path, _content(source, target, base["state"]))

    copied = create_journal(target, base, write)
    for record in journal.records:
        copied.append(record)
    tombstone = {**base, "deleted": True, "state": None, "marks": [], "replies": [], "position": 0}
    try:
        journal.bury(tombstone)
    except Fenced:
        copied.bury(tombstone)
        problem = "a call came while the stream was moved; nothing was moved"
        raise ServeError(503, "E1214", "streams", problem, "stop the server, and move it again") from None
    return {"owner": target.owner, "name": target.name, "position": copied.last["position"]}


def _copy(source: Place, target: Place, file: str) -> None:
    content = _content(source, target, file)
    target.store.save(target.path(file), lambda path: _write(path, content))


def _content(source: Place, target: Place, file: str) -> bytes:
    """A state file of the source, with the encryption of the target."""
    content = source.store.read(source.path(file))
    return target.seal.seal_state(target.owner, source.seal.open_state(source.owner, content))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_bundle(bundle: Path | None) -> None:
    """Raises BundleError if there is no such bundle."""
    if bundle is not None and not (bundle / "manifest.json").is_file():
        raise BundleError("E0201", "bundle", f"{bundle} is not a bundle", "give the path of a NAME.titans folder")
