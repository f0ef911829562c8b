"""Named streams: each call is applied once, journalled, and then answered. docs/serving.md has the guarantees."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

import titans_runtime as rt

from .batcher import Batcher, Cancelled, Job
from .config import Config
from .errors import RUNTIME_STATUS, Fenced, ServeError, store_error
from .journal import Journal, Place, Record, create_journal, finish_deletion, read_journal
from .logs import log
from .metrics import Metrics
from .operations import Work, from_part, part_size
from .sampling import Floats
from .seal import Seal
from .store import Store

T = TypeVar("T")
_ATTEMPTS = 4


class Operation(Protocol):
    """A call that reads tokens."""

    def steps(self, work: Work) -> Any:
        """The steps for the batcher; they return the answer."""


@dataclass(frozen=True)
class Request:
    """What a call demands beside its operation. body: a description of the call that equal calls share."""

    op: str
    body: Any
    key: str | None = None
    if_match: int | None = None

    @property
    def digest(self) -> str:
        """A hash of the call, which a repeated call must share."""
        text = json.dumps([self.op, self.body], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def seed(self) -> int:
        """A seed for a call without one. A repeated call with a key draws the same tokens."""
        if self.key is None:
            return secrets.randbits(63)
        return int.from_bytes(hashlib.sha256(f"{self.key} {self.digest}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Reply:
    """The answer to a call. replayed: it was stored by an earlier request with the same key."""

    body: dict[str, Any]
    position: int
    replayed: bool = False


@dataclass
class Control:
    """Ends a call whose client has gone. A call that is being journalled is finished."""

    cancelled: bool = False
    job: Job[Any] | None = None
    shown: bool = False

    def cancel(self) -> None:
        """Ends the call before its next block."""
        self.cancelled = True
        if self.job is not None:
            self.job.cancel()


@dataclass(eq=False)
class Entry:
    """A stream in this process: a copy of what the store holds, or nothing until its first call."""

    place: Place
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    used: float = 0.0
    journal: Journal | None = None
    stream: rt.Stream | None = None
    last: Floats | None = None
    position: int = 0
    seq: int = 0
    marks: list[Record] = field(default_factory=list)
    replies: OrderedDict[str, Record] = field(default_factory=OrderedDict)
    attempts: set[str] = field(default_factory=set)
    rollbacks: int = 0
    tokens_since: int = 0


class Streams:
    """All named streams of a store, for one session."""

    def __init__(
        self,
        session: rt.Session,
        weights: str,
        store: Store,
        seal: Seal,
        config: Config,
        batcher: Batcher,
        metrics: Metrics,
    ) -> None:
        """weights: a hash of the model's weights. Streams of others are refused."""
        self._session, self._store, self._seal, self._config = session, store, seal, config
        self._batcher, self._metrics = batcher, metrics
        self._entries: dict[tuple[str, str], Entry] = {}
        self._writer = secrets.token_hex(8)
        self._io = ThreadPoolExecutor(16, "titans-store")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._owned: dict[str, set[str]] = {}
        self._model = {"name": session.info["model"]["name"], "weights": weights}

    # Calls

    async def call(self, owner: str, name: str, request: Request, operation: Operation, control: Control) -> Reply:
        """Applies a call that reads tokens. Raises ServeError, rt.Error, Cancelled; then nothing was learned."""

        async def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            work = Work(entry.position, entry.last, self._config.prompt_block, self._session.vocab_size)
            answer = await self.run(entry.stream, operation, work, control)
            entry.last, entry.position = work.last, work.position
            return answer, {"parts": work.parts}

        return await self._call(owner, name, request, apply, control)

    async def run(self, stream: rt.Stream | None, operation: Operation, work: Work, control: Control) -> Any:
        """Runs a call's steps in the batcher."""
        assert stream is not None
        job: Job[Any] = Job(stream, operation.steps(work))
        control.job = job
        if control.cancelled:
            job.cancel()
        self._batcher.submit(job)
        try:
            return await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            job.cancel()
            await asyncio.wait([asyncio.wrap_future(job.done)])
            raise

    async def set_learning(self, owner: str, name: str, request: Request, learning: bool) -> Reply:
        """Lets the memory learn, or freezes it."""

        def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            assert entry.stream is not None
            (entry.stream.resume if learning else entry.stream.freeze)()
            return {}, {}

        return await self._simple(owner, name, request, apply)

    async def reset(self, owner: str, name: str, request: Request) -> Reply:
        """Resets the stream to position 0. Its marks are removed."""

        def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            assert entry.stream is not None
            entry.stream.reset()
            entry.position, entry.last, entry.marks = 0, None, []
            return {}, {}

        return await self._simple(owner, name, request, apply)

    async def mark(self, owner: str, name: str, request: Request) -> Reply:
        """Keeps the state in the store, for `rewind`."""

        def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            assert entry.stream is not None and entry.journal is not None
            others = [mark for mark in entry.marks if mark["position"] != entry.position]
            if len(others) >= self._config.max_marks:
                problem = f"the stream has {len(others)} marks, the most that this server allows"
                raise ServeError(400, "E1217", "stream", problem, "remove one with unmark")
            file = f"mark-{entry.journal.number:08d}-{secrets.token_hex(4)}.tstate"
            self._save(entry.place, file, entry.stream)
            mark = {"position": entry.position, "learning": entry.stream.learning, "file": file}
            entry.marks = sorted([*others, mark], key=lambda one: int(one["position"]))
            return {"marked": entry.position}, {"mark": mark}

        return await self._simple(owner, name, request, apply)

    async def rewind(self, owner: str, name: str, request: Request, position: int) -> Reply:
        """Returns to a mark. Later marks are removed."""

        def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            self._rewind(entry, _mark(entry, position))
            return {}, {"mark": _mark(entry, position)}

        return await self._simple(owner, name, request, apply)

    async def unmark(self, owner: str, name: str, request: Request, position: int) -> Reply:
        """Removes a mark."""

        def apply(entry: Entry) -> tuple[dict[str, Any], Record]:
            entry.marks.remove(_mark(entry, position))
            return {"unmarked": position}, {"unmark": position}

        return await self._simple(owner, name, request, apply)

    async def _simple(
        self, owner: str, name: str, request: Request, apply: Callable[[Entry], tuple[dict[str, Any], Record]]
    ) -> Reply:
        async def run(entry: Entry) -> tuple[dict[str, Any], Record]:
            return await self._in_thread(lambda: apply(entry))

        return await self._call(owner, name, request, run, Control())

    async def _call(self, owner: str, name: str, request: Request, apply: Any, control: Control) -> Reply:
        async with self._hold(owner, name) as entry:
            if control.cancelled:
                raise Cancelled
            reply = await self._apply(entry, request, apply, control)
        if self._snapshot_is_due(entry):
            self._background(self._snapshot_later(owner, name))
        return reply

    @asynccontextmanager
    async def _hold(self, owner: str, name: str) -> AsyncIterator[Entry]:
        """A stream for one request. Requests wait in the order in which they came."""
        entry = self._entry(owner, name)
        if entry.waiting >= self._config.max_waiting:
            problem = f"{entry.waiting} requests wait for this stream"
            raise ServeError(503, "E1206", "stream", problem, "send them one after another", retry_after=1)
        entry.waiting += 1
        try:
            async with entry.lock:
                yield entry
        finally:
            entry.waiting -= 1
            self._evict()

    async def _apply(self, entry: Entry, request: Request, apply: Any, control: Control) -> Reply:
        """One call on a locked stream. After any failure the copy in memory is dropped, and read again at the next."""
        attempt, made = secrets.token_hex(8), Reply({}, 0)
        for _ in range(_ATTEMPTS):
            begun, fresh = False, entry.stream is None
            try:
                await self._load(entry)
                if stored := self._stored(entry, request):
                    return stored
                if attempt in entry.attempts:  # it was journalled, although the store reported the opposite
                    return made
                _check_position(entry, request)
                begun = True
                answer, fields = await apply(entry)
                made = self._reply(entry, request, answer)
                committing = functools.partial(self._commit, entry, request, made.body, fields, attempt)
                await self._in_thread(committing)
                return made
            except Fenced:
                self._drop(entry)
                self._metrics.fenced.add()
                if control.shown:
                    break
            except OSError as error:
                self._drop(entry)
                raise store_error(f"cannot write the stream: {error.strerror or error}") from error
            except ServeError as error:
                if begun or not fresh:
                    self._drop(entry)
                if fresh or error.status not in (404, 409):
                    raise
                # Another server may have gone on with the stream: the refusal must rest on what the store has.
            except BaseException:
                self._drop(entry)
                raise
        problem = "other servers write to the same stream"
        raise ServeError(503, "E1214", "stream", problem, "repeat the request", retry_after=1)

    def _reply(self, entry: Entry, request: Request, answer: dict[str, Any]) -> Reply:
        assert entry.stream is not None
        body = {"object": f"stream.{request.op}", "name": entry.place.name, **answer}
        body |= {"position": entry.position, "learning": entry.stream.learning}
        return Reply(body, entry.position)

    def _commit(self, entry: Entry, request: Request, body: dict[str, Any], fields: Record, attempt: str) -> None:
        """Journals a call. It is durable when this returns."""
        journal, stream = entry.journal, entry.stream
        assert journal is not None and stream is not None
        entry.seq += 1
        record: Record = {
            "kind": "call",
            "op": request.op,
            "id": attempt,
            "seq": entry.seq,
            "epoch": self._epoch(journal),
            "writer": self._writer,
            "time": now(),
            "position": entry.position,
            "learning": stream.learning,
            **fields,
        }
        if request.key is not None:
            record |= {"key": request.key, "hash": request.digest, "reply": body}
            self._remember(entry, record)
        started = time.perf_counter()
        rollbacks = stream.guard_report.rollbacks
        if rollbacks != entry.rollbacks:
            # The guard's own marks are not in the journal, so a replay could end elsewhere. A snapshot cannot.
            entry.rollbacks = rollbacks
            self._compact(entry, {"last_id": attempt})
        else:
            journal.append(record)
            entry.tokens_since += sum(map(part_size, fields.get("parts", ())))
        self._metrics.journal_seconds.observe(time.perf_counter() - started)

    def _stored(self, entry: Entry, request: Request) -> Reply | None:
        if request.key is None or (found := entry.replies.get(request.key)) is None:
            return None
        if found["hash"] != request.digest:
            problem = "the Idempotency-Key belongs to another request"
            raise ServeError(422, "E1210", "request", problem, "use a new key for each request")
        self._metrics.replayed.add()
        return Reply(found["reply"], found["reply"]["position"], replayed=True)

    def _remember(self, entry: Entry, record: Record) -> None:
        entry.replies[record["key"]] = {"hash": record["hash"], "reply": record["reply"]}
        while len(entry.replies) > self._config.keep_replies:
            entry.replies.popitem(last=False)

    # Streams as a whole

    async def create(
        self, owner: str, name: str, request: Request, stream: rt.Stream | None = None, learning: bool = True
    ) -> Reply:
        """A new stream, with the state of `stream` if it is given."""
        async with self._hold(owner, name) as entry:
            if (stored := await self._existing(entry, request)) is not None:
                return stored
            owned = await self._names(owner)
            if len(owned) >= self._config.max_streams:
                problem = f"the API key has {len(owned)} streams, the most that this server allows"
                raise ServeError(400, "E1217", "stream", problem, "delete some")
            try:
                reply = await self._in_thread(lambda: self._create(entry, request, stream, learning))
            except (FileExistsError, Fenced):
                raise _exists() from None
            except OSError as error:
                raise store_error(f"cannot write the stream: {error.strerror or error}") from error
            owned.add(name)
        return reply

    async def ensure(self, owner: str, name: str) -> None:
        """Creates the stream if there is none."""
        try:
            async with self._hold(owner, name) as entry:
                await self._load_or_fail(entry)
                return
        except ServeError as error:
            if error.status != 404:
                raise
        try:
            await self.create(owner, name, Request("create", {"name": name}))
        except ServeError as error:
            if error.code != "TITANS-E1208":
                raise

    async def _existing(self, entry: Entry, request: Request) -> Reply | None:
        """The stored reply of a repeated creation. Raises ServeError if another request made the stream."""
        try:
            await self._load_or_fail(entry)
        except ServeError as error:
            if error.status == 404:
                return None
            raise
        if (stored := self._stored(entry, request)) is None:
            raise _exists()
        return stored

    def _create(self, entry: Entry, request: Request, stream: rt.Stream | None, learning: bool) -> Reply:
        made = stream if stream is not None else self._session.stream()
        if not learning:
            made.freeze()
        body = {"object": "stream", "name": entry.place.name, "position": made.position, "learning": made.learning}
        base: Record = {
            "kind": "base",
            "seq": 0,
            "epoch": 0,
            "writer": self._writer,
            "created": now(),
            "time": now(),
            "model": self._model,
            "position": made.position,
            "learning": made.learning,
            "state": None,
            "marks": [],
            "replies": [],
        }
        if request.key is not None:
            base["replies"] = [[request.key, {"hash": request.digest, "reply": body}]]
        write = None
        if made.position:
            key = self._seal.owner_key(entry.place.owner)

            def write(path: Path) -> None:
                made.save(path, key)

        try:
            create_journal(entry.place, base, write)
        finally:
            made.close()
        self._drop(entry)  # the first call reads it from the store
        return Reply(body, base["position"])

    async def fork(self, owner: str, name: str) -> rt.Stream:
        """An independent copy of a stream, in memory only."""
        async with self._hold(owner, name) as entry:
            await self._load_or_fail(entry)
            stream = entry.stream
            assert stream is not None
            return await self._in_thread(stream.fork)

    async def info(self, owner: str, name: str, memory: bool = False) -> dict[str, Any]:
        """The stream's position, health, sizes and marks; with `memory`, the norm of each memory field."""
        async with self._hold(owner, name) as entry:
            await self._load_or_fail(entry)
            return await self._in_thread(lambda: self._describe(entry, memory))

    def _describe(self, entry: Entry, memory: bool) -> dict[str, Any]:
        stream, journal = entry.stream, entry.journal
        assert stream is not None and journal is not None
        health = stream.health
        found: dict[str, Any] = {
            **summary(journal),
            "marks": [mark["position"] for mark in entry.marks],
            "state_bytes": stream.state_bytes,
            "health": {"state": health.state, "divergences": health.divergences},
        }
        if memory:
            norms = {name: float(np.linalg.norm(values)) for name, values in stream.memory().items()}
            found["memory_norms"] = {name: norm if np.isfinite(norm) else None for name, norm in norms.items()}
        return found

    async def page(self, owner: str, after: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """The streams whose names follow `after`, and whether more follow."""
        names = sorted(name for name in await self._names(owner, fresh=True) if name > after)

        def read() -> list[dict[str, Any]]:
            journals = [read_journal(self._place(owner, name)) for name in names[:limit]]
            return [summary(journal) for journal in journals if journal is not None]

        try:
            return await self._in_thread(read), len(names) > limit
        except OSError as error:
            raise store_error(f"cannot list the streams: {error.strerror or error}") from error

    async def delete(self, owner: str, name: str, if_match: int | None) -> None:
        """Removes a stream and everything that was kept of it."""
        async with self._hold(owner, name) as entry:
            try:
                await self._load_or_fail(entry)
            except ServeError as error:
                if error.status == 404:
                    await self._in_thread(lambda: _finish_deletion(entry.place))
                raise
            _check_position(entry, Request("delete", {}, if_match=if_match))
            journal = entry.journal
            assert journal is not None
            tombstone = {"kind": "base", "deleted": True, "seq": 0, "epoch": self._epoch(journal), "time": now()}
            tombstone |= {"writer": self._writer, "position": 0, "learning": True}
            try:
                await self._in_thread(lambda: journal.bury(tombstone))
            except Fenced:
                raise ServeError(503, "E1214", "stream", "other servers write to it", "repeat", retry_after=1) from None
            except OSError as error:
                raise store_error(f"cannot delete the stream: {error.strerror or error}") from error
            finally:
                self._drop(entry)
            (await self._names(owner)).discard(name)

    async def snapshot(self, owner: str, name: str) -> dict[str, Any]:
        """Writes a snapshot now, so that the next start replays nothing."""
        async with self._hold(owner, name) as entry:
            await self._load_or_fail(entry)
            await self._snapshot(entry, raising=True)
            journal = entry.journal
            return {"object": "stream.save", **(summary(journal) if journal else {})}

    async def download(self, owner: str, name: str, path: Path) -> int:
        """Writes a state file that is not encrypted. Returns the position."""
        async with self._hold(owner, name) as entry:
            await self._load_or_fail(entry)
            stream = entry.stream
            assert stream is not None
            await self._in_thread(lambda: stream.save(path))
            return entry.position

    async def close(self) -> None:
        """Saves what a restart would have to replay, and closes all streams."""
        for owner, name in list(self._entries):
            async with self._hold(owner, name) as entry:
                if entry.journal is not None and entry.journal.records:
                    await self._snapshot(entry, raising=False)
                self._drop(entry)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._io.shutdown()

    @property
    def resident(self) -> int:
        """The number of streams in memory."""
        return sum(entry.stream is not None for entry in self._entries.values())

    # The copy in memory

    def _entry(self, owner: str, name: str) -> Entry:
        key = (owner, name)
        if key not in self._entries:
            self._entries[key] = Entry(self._place(owner, name))
        self._entries[key].used = time.monotonic()
        return self._entries[key]

    def _place(self, owner: str, name: str) -> Place:
        return Place(self._store, self._seal, owner, name)

    async def _load_or_fail(self, entry: Entry) -> None:
        """Loads the stream as the store has it now: another server may have gone on with it."""
        try:
            journal = entry.journal
            if journal is not None and not await self._in_thread(
                lambda: self._store.is_end(entry.place.path(journal.log), journal.end)
            ):
                self._drop(entry)
            await self._load(entry)
        except OSError as error:
            raise store_error(f"cannot read the stream: {error.strerror or error}") from error

    async def _load(self, entry: Entry) -> None:
        if entry.stream is None:
            try:
                await self._in_thread(lambda: self._restore(entry))
            except BaseException:
                self._drop(entry)
                raise

    def _restore(self, entry: Entry) -> None:
        started = time.perf_counter()
        journal = read_journal(entry.place)
        if journal is None:
            raise ServeError(404, "E1207", "stream", "no such stream", "create it first")
        base = journal.base
        if base["model"] != self._model:
            problem = f"the stream belongs to the model {base['model']['name']}"
            raise ServeError(409, "E1215", "stream", problem, "serve the bundle of that model")
        entry.journal, entry.marks, entry.seq = journal, list(base["marks"]), base["seq"]
        entry.replies = OrderedDict(base["replies"])
        entry.attempts = {base.get("last_id", ""), *(record["id"] for record in journal.records)}
        if base["state"] is None:
            entry.stream, entry.last = self._session.stream(), None
            if not base["learning"]:
                entry.stream.freeze()
        else:
            self._open(entry, base["state"])
        entry.position, entry.rollbacks = base["position"], 0
        entry.tokens_since = 0
        for record in journal.records:
            self._replay(entry, record)
        assert entry.stream is not None
        entry.rollbacks = entry.stream.guard_report.rollbacks
        if entry.stream.position != journal.last["position"]:
            fix = "restore an older copy of the stream's folder"
            raise ServeError(500, "E1213", "store", "the journal does not lead to its own position", fix)
        self._metrics.restored.add()
        self._metrics.replayed_tokens.add(entry.tokens_since)
        self._metrics.restore_seconds.observe(time.perf_counter() - started)

    def _replay(self, entry: Entry, record: Record) -> None:
        """Applies a record in the cuts of the call, which gives the same bits."""
        assert entry.stream is not None
        for part in record.get("parts", ()):
            tokens, block = from_part(part), part["block"]
            for start in range(0, len(tokens), block):
                entry.last = entry.stream.feed(tokens[start : start + block], outputs="last")
            entry.tokens_since += len(tokens)
        op = record["op"]
        if op == "reset":
            entry.stream.reset()
            entry.last, entry.marks = None, []
        elif op == "mark":
            others = [mark for mark in entry.marks if mark["position"] != record["mark"]["position"]]
            entry.marks = sorted([*others, record["mark"]], key=lambda one: int(one["position"]))
        elif op == "unmark":
            entry.marks = [mark for mark in entry.marks if mark["position"] != record["unmark"]]
        elif op == "rewind":
            self._rewind(entry, record["mark"])
        if record["learning"] != entry.stream.learning:
            (entry.stream.resume if record["learning"] else entry.stream.freeze)()
        entry.position, entry.seq = record["position"], record["seq"]
        if "key" in record:
            self._remember(entry, record)

    def _rewind(self, entry: Entry, mark: Record) -> None:
        before = entry.stream
        self._open(entry, mark["file"])
        if before is not None:
            before.close()
        entry.position = mark["position"]
        entry.marks = [one for one in entry.marks if one["position"] <= mark["position"]]

    def _open(self, entry: Entry, file: str) -> None:
        """Restores a state file of the store, with the outputs after its last token."""
        key = self._seal.owner_key(entry.place.owner)
        with self._store.open(entry.place.path(file)) as path:
            try:
                entry.stream = self._session.restore(path, key)
                outputs = rt.read_state(path, key).tensors.get("last_output")
            except rt.Error as error:
                if error.code == "TITANS-E0407":
                    problem = "the stream belongs to another model"
                    raise ServeError(409, "E1215", "stream", problem, "serve the bundle of that model") from None
                fix = "restore an older copy of the stream's folder"
                raise ServeError(500, "E1213", "store", f"damaged snapshot: {error}", fix) from None
        entry.last = outputs
        entry.rollbacks = entry.stream.guard_report.rollbacks

    def _drop(self, entry: Entry) -> None:
        """Forgets the copy in memory. The store has everything that was acknowledged."""
        stream, entry.stream, entry.journal, entry.last = entry.stream, None, None, None
        entry.replies, entry.marks, entry.attempts = OrderedDict(), [], set()
        if stream is not None:
            stream.close()

    def _evict(self) -> None:
        """Drops the streams used longest ago, beyond the number that may be in memory."""
        excess = self.resident - self._config.resident_streams
        if excess > 0:
            idle = [entry for entry in self._entries.values() if not entry.waiting and entry.stream is not None]
            for entry in sorted(idle, key=lambda entry: entry.used)[:excess]:
                self._drop(entry)
        for key in [key for key, entry in self._entries.items() if not entry.waiting and entry.stream is None]:
            del self._entries[key]

    # Snapshots

    def _snapshot_is_due(self, entry: Entry) -> bool:
        journal = entry.journal
        return journal is not None and (
            len(journal.records) >= self._config.snapshot_calls or entry.tokens_since >= self._config.snapshot_tokens
        )

    async def _snapshot_later(self, owner: str, name: str) -> None:
        try:
            async with self._hold(owner, name) as entry:
                if self._snapshot_is_due(entry):
                    await self._snapshot(entry, raising=False)
        except ServeError as error:  # a later call tries again
            log("snapshot_delayed", code=error.code)

    async def _snapshot(self, entry: Entry, raising: bool) -> None:
        try:
            await self._in_thread(lambda: self._compact(entry, {}))
        except (OSError, Fenced, rt.Error) as error:
            self._drop(entry)
            log("snapshot_failed", error=type(error).__name__)
            if raising:
                raise store_error("cannot write a snapshot") from error

    def _compact(self, entry: Entry, more: Record) -> None:
        journal, stream = entry.journal, entry.stream
        assert journal is not None and stream is not None
        tag = journal.new_tag()
        state = None
        if stream.position:
            state = f"state-{tag}.tstate"
            self._save(entry.place, state, stream)
        base: Record = {
            "kind": "base",
            "seq": entry.seq,
            "epoch": self._epoch(journal),
            "writer": self._writer,
            "created": journal.base["created"],
            "time": now(),
            "model": self._model,
            "position": stream.position,
            "learning": stream.learning,
            "state": state,
            "marks": entry.marks,
            "replies": list(entry.replies.items()),
            "last_id": journal.last.get("id", journal.base.get("last_id", "")),
            **more,
        }
        journal.compact(tag, base, self._config.keep_snapshots)
        entry.tokens_since = 0
        self._metrics.snapshots.add()

    def _save(self, place: Place, file: str, stream: rt.Stream) -> None:
        key = self._seal.owner_key(place.owner)
        try:
            self._store.save(place.path(file), lambda path: stream.save(path, key))
        except rt.Error as error:
            raise OSError(0, str(error)) from error

    def _epoch(self, journal: Journal) -> int:
        """A server that takes a stream over raises its epoch."""
        return int(journal.last["epoch"]) + int(journal.last["writer"] != self._writer)

    # Helpers

    async def _names(self, owner: str, fresh: bool = False) -> set[str]:
        """The names of an owner's streams."""
        if fresh or owner not in self._owned:

            def read() -> set[str]:
                names = self._store.names(f"streams/{owner}")
                return {name for name in names if read_journal(self._place(owner, name)) is not None}

            try:
                self._owned[owner] = await self._in_thread(read)
            except OSError as error:
                raise store_error(f"cannot list the streams: {error.strerror or error}") from error
        return self._owned[owner]

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Runs in a thread to its end, also if the request is cancelled meanwhile."""
        running = asyncio.get_running_loop().run_in_executor(self._io, function)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def summary(journal: Journal) -> dict[str, Any]:
    """What the journal alone shows of a stream."""
    last, place = journal.last, journal.place
    return {
        "object": "stream",
        "name": place.name,
        "position": last["position"],
        "learning": last["learning"],
        "created": journal.base["created"],
        "updated": last["time"],
        "calls": last["seq"],
        "epoch": last["epoch"],
        "journalled_calls": len(journal.records),
        "journal_bytes": place.store.size(place.path(journal.log)),
    }


def now() -> str:
    """The time, for users only: nothing depends on it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def runtime_status(error: rt.Error) -> int:
    """The HTTP status for an error of the runtime."""
    return RUNTIME_STATUS.get(error.code, 500)


def _mark(entry: Entry, position: int) -> Record:
    for mark in entry.marks:
        if mark["position"] == position:
            return mark
    raise ServeError(404, "E0408", "stream", f"no mark at position {position}", "mark the stream there first")


def _finish_deletion(place: Place) -> None:
    with suppress(OSError, Fenced):  # another request tries again
        finish_deletion(place)


def _exists() -> ServeError:
    return ServeError(409, "E1208", "stream", "the stream exists", "choose another name")


def _check_position(entry: Entry, request: Request) -> None:
    if request.if_match is not None and request.if_match != entry.position:
        problem = f"expected position {request.if_match}, got {entry.position}"
        fix = "read the stream's position and send the tokens that it has not read"
        raise ServeError(409, "E1209", "stream", problem, fix, position=entry.position)
