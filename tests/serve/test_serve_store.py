"""Journals and stores without a server: torn records, damage, fencing, encryption, compaction."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from titans_export.serve.errors import ConfigError, DamagedLog, Fenced, ServeError
from titans_export.serve.folder_store import FolderStore
from titans_export.serve.frames import HEADER_BYTES, frame, read_frames
from titans_export.serve.fsspec_store import FsspecStore
from titans_export.serve.journal import ANCHOR, Journal, Place, create_journal, read_journal
from titans_export.serve.seal import MARKER, Seal, open_seal
from titans_export.serve.store import Store, open_store

KEY = bytes(range(32))


def base(seq: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "base", "seq": seq, "epoch": 0, "state": None, "marks": [], "replies": [], **more}


def record(seq: int) -> dict[str, Any]:
    return {"kind": "call", "seq": seq, "epoch": 1}


@pytest.fixture(params=["folder", "fsspec-local", "fsspec-memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    urls = {
        "folder": str(tmp_path / "store"),
        "fsspec-local": f"local://{tmp_path}/store",
        "fsspec-memory": f"memory://{secrets.token_hex(4)}",
    }
    return open_store(urls[request.param])


def place(store: Store, key: bytes | None = None, name: str = "a") -> Place:
    return Place(store, open_seal(store, key), "owner", name)


def read(where: Place) -> Journal:
    found = read_journal(where)
    assert found is not None
    return found


def test_a_journal_is_read_as_written(store: Store) -> None:
    where = place(store)
    assert read_journal(where) is None
    journal = create_journal(where, base())
    for seq in range(3):
        journal.append(record(seq))
    assert read(where).records == [record(0), record(1), record(2)]
    with pytest.raises(FileExistsError):
        create_journal(where, base())
    journal.compact(journal.new_tag(), base(3), keep=1)
    journal.append(record(4))
    found = read(where)
    assert (found.base["seq"], found.records) == (3, [record(4)])
    for seq in range(5, 8):
        journal.compact(journal.new_tag(), base(seq), keep=1)
    assert [name[:12] for name in store.names(where.folder)] == ["log-00000000", "log-00000004", "log-00000005"]
    assert read(where).base["seq"] == 7


def test_a_log_that_has_gone_on_refuses_other_writers(store: Store) -> None:
    """Of two owners, whoever writes second must read first; also after a compaction, a deletion and a new creation."""
    where = place(store)
    create_journal(where, base())
    one, other = read(where), read(where)
    one.append(record(1))
    with pytest.raises(Fenced):
        other.append(record(1))
    other = read(where)
    assert other.records == [record(1)]
    one.compact(one.new_tag(), base(1), keep=0)
    with pytest.raises(Fenced):
        other.append(record(2))
    with pytest.raises(Fenced):
        other.compact(other.new_tag(), base(9), keep=0)
    other = read(where)
    assert other.base["seq"] == 1  # the log of the refused compaction is not the stream's
    one.compact(one.new_tag(), base(2, deleted=True), keep=0)
    with pytest.raises(Fenced):
        other.append(record(2))
    assert read_journal(where) is None
    create_journal(where, base(7))
    with pytest.raises(Fenced):
        one.append(record(3))
    assert read(where).base["seq"] == 7


def test_a_crash_between_any_two_steps_of_a_compaction(tmp_path: Path) -> None:
    """The process ends after each write or removal in turn; the stream is the one before or after the compaction."""

    class Crash(Exception):
        pass

    class Dying(FolderStore):
        left = 1000

        def _step(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Crash

        def create_log(self, path: str, payload: bytes) -> Any:
            self._step()
            return super().create_log(path, payload)

        def append(self, path: str, end: Any, payload: bytes) -> Any:
            self._step()
            return super().append(path, end, payload)

        def remove(self, path: str) -> None:
            self._step()
            super().remove(path)

    for keep in (0, 1):
        for steps in range(9):
            store = Dying(tmp_path / f"store-{keep}-{steps}")
            where = Place(store, Seal(None, b""), "owner", "a")
            journal = create_journal(where, base())
            journal.append(record(1))
            store.left = steps
            seq = 1
            try:
                for seq in range(2, 6):
                    journal.compact(journal.new_tag(), base(seq), keep)
            except Crash:
                pass
            store.left = 1000
            found = read(where)
            assert found.last["seq"] in (seq - 1, seq), (keep, steps)
            found.compact(found.new_tag(), base(100), keep)
            found.compact(found.new_tag(), base(101), keep)
            assert read(where).base["seq"] == 101
            assert len(store.names(where.folder)) == 3


def test_a_torn_last_record_is_dropped_at_every_byte(tmp_path: Path) -> None:
    where = place(FolderStore(tmp_path / "store"))
    journal = create_journal(where, base())
    journal.append(record(1))
    path = tmp_path / "store" / where.path(journal.log)
    whole = path.read_bytes()
    journal.append(record(2))
    longer = path.read_bytes()
    for size in range(len(whole), len(longer)):
        for tail in (b"", bytes(len(longer) - size)):  # a file system may fill the rest with zeros
            path.write_bytes(longer[:size] + tail)
            found = read(where)
            assert found.records == [record(1)], size
            found.append(record(3))
            assert read(where).records == [record(1), record(3)]


def test_damage_of_an_acknowledged_record_is_found_at_every_byte(tmp_path: Path) -> None:
    where = place(FolderStore(tmp_path / "store"))
    journal = create_journal(where, base())
    path = tmp_path / "store" / where.path(journal.log)
    first = path.stat().st_size
    journal.append(record(1))
    second = path.stat().st_size
    journal.append(record(2))
    content = path.read_bytes()
    for at in range(first, second):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        with pytest.raises(ServeError, match="TITANS-E1213"):
            read_journal(where)


def test_frames_hold_any_bytes() -> None:
    payloads = [b"", b"TSL1" * 9, bytes(range(256)) * 5, frame(b"inner") + b"x"]
    data = b"".join(map(frame, payloads))
    assert read_frames(data) == (payloads, len(data))
    # The frame inside of a torn payload is a whole record for a reader, so it is not taken for the torn end.
    assert read_frames(data[: HEADER_BYTES - 1]) == ([], 0)
    with pytest.raises(DamagedLog):
        read_frames(b"x" + data)


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = place(FolderStore(tmp_path / "store"))
    journal = create_journal(where, base())
    write = os.pwrite

    def full(handle: int, content: bytes, offset: int) -> int:
        if offset > journal.end.bytes:
            raise OSError(28, "No space left on device")
        return write(handle, content[:5], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        journal.append(record(1))
    monkeypatch.undo()
    assert (tmp_path / "store" / where.path(journal.log)).stat().st_size == journal.end.bytes
    journal.append(record(1))
    assert read(where).records == [record(1)]


def test_a_missing_log_of_the_chain_is_an_error(tmp_path: Path) -> None:
    where = place(FolderStore(tmp_path / "store"))
    create_journal(where, base())
    (log,) = (name for name in os.listdir(tmp_path / "store" / where.folder) if name != ANCHOR)
    (tmp_path / "store" / where.path(log)).unlink()
    with pytest.raises(ServeError, match="TITANS-E1212"):
        read_journal(where)


def test_encryption_hides_records_and_binds_them_to_their_place(store: Store) -> None:
    where = place(store, KEY)
    journal = create_journal(where, base(note="secret"))
    journal.append({**record(1), "note": "secret"})
    assert read(where).base["note"] == "secret"
    for name in store.names(where.folder):
        payloads, _ = store.read_log(where.path(name))
        assert not any(b"secret" in payload for payload in payloads)
    other = place(store, KEY, "b")
    copied = create_journal(other, base())
    payloads, _ = store.read_log(where.path(journal.log))
    store.append(other.path(copied.log), copied.end, payloads[1])
    with pytest.raises(ServeError, match="does not decrypt"):
        read_journal(other)
    assert where.seal.owner_key("owner") != where.seal.owner_key("other")
    for key, problem in ((None, "is encrypted"), (bytes(32), "wrong key")):
        with pytest.raises(ConfigError, match=problem):
            open_seal(store, key)


def test_places_that_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="TITANS-E1220"):
        open_seal(FolderStore(tmp_path), None)
    store = FolderStore(tmp_path / "store")
    open_seal(store, None)
    with pytest.raises(ConfigError, match="TITANS-E1221"):
        open_seal(store, KEY)
    for marker in (b"{}", b"[]", b"x", json.dumps({"format": "titans-store", "salt": "", "check": None}).encode()):
        (tmp_path / "store" / MARKER).write_bytes(marker)
        with pytest.raises(ConfigError, match="TITANS-E1220"):
            open_seal(store, None)
    with pytest.raises(ConfigError, match="only if it is missing"):
        FsspecStore(f"dir::file://{tmp_path}")


def test_states_are_stored_and_read_back(store: Store, tmp_path: Path) -> None:
    write: Callable[[Path], object] = lambda path: path.write_bytes(b"state")  # noqa: E731
    store.save("streams/owner/a/state-1.tstate", lambda path: write(path) and None)
    with store.open("streams/owner/a/state-1.tstate") as path:
        assert path.read_bytes() == b"state"
    assert store.size("streams/owner/a/state-1.tstate") == 5
    store.remove("streams/owner/a/state-1.tstate")
    store.remove("streams/owner/a/state-1.tstate")
    with pytest.raises(FileNotFoundError):
        store.read("streams/owner/a/state-1.tstate")


def test_the_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    journal = create_journal(place(FolderStore(tmp_path / "store")), base())
    path = tmp_path / "store" / journal.place.path(journal.log)
    assert path.stat().st_mode & 0o77 == 0
    assert path.parent.stat().st_mode & 0o77 == 0
    assert fsspec.filesystem("local").exists(str(path))
