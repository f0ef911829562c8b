"""Routes of named streams, /v1/streams."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask

from .errors import ServeError
from .http import ERRORS, answer, demands, server_of, stream_events
from .names import PATTERN
from .operations import Emit, Feed, Generate
from .sampling import Sampling
from .schemas import Answer, Create, FeedBody, ForkBody, GenerateBody, PositionBody, ScoreBody
from .server import Events, Server
from .streams import Control, Reply, Request

router = APIRouter(prefix="/v1/streams", tags=["streams"], responses=ERRORS)
Name = Annotated[str, PathParameter(pattern=PATTERN, description="The stream's name.")]


@router.post("", status_code=201, response_model=Answer)
async def create_stream(request: HttpRequest, body: Create | None = None) -> Response:
    """Creates a stream with a fresh memory."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    body = body or Create()
    call = demands(request, "create", body.model_dump())
    name = body.name or _random_name(call)
    return answer(await server.streams.create(owner, name, call, learning=body.learning), 201)


@router.get("", response_model=Answer)
async def list_streams(
    request: HttpRequest,
    after: Annotated[str, Query(max_length=128, description="The last name of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> Response:
    """The streams of this API key, sorted by name."""
    server = server_of(request)
    owner = server.caller(request, "read").name
    data, more = await server.streams.page(owner, after, limit)
    return JSONResponse({"object": "list", "data": data, "has_more": more})


@router.get("/{name}", response_model=Answer)
async def show_stream(
    request: HttpRequest,
    name: Name,
    memory: Annotated[bool, Query(description="Add the norm of each memory field.")] = False,
) -> Response:
    """Position, learning, health, marks and sizes."""
    server = server_of(request)
    owner = server.caller(request, "read").name
    body = await server.streams.info(owner, name, memory)
    return answer(Reply(body, body["position"]))


@router.delete("/{name}", response_model=Answer)
async def delete_stream(request: HttpRequest, name: Name) -> Response:
    """Removes the stream with everything that was kept of it. If-Match is respected."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    await server.streams.delete(owner, name, demands(request, "delete", {}).if_match)
    return JSONResponse({"object": "stream.deleted", "name": name, "deleted": True})


@router.post("/{name}/feed", response_model=Answer)
async def feed(request: HttpRequest, name: Name, body: FeedBody) -> Response:
    """Reads text, tokens or vectors; the memory learns from each."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    tokens = server.input(body)
    call = demands(request, "feed", body.model_dump(exclude_none=True))
    return answer(await _reads(server, request, owner, name, call, Feed(tokens), len(tokens)))


@router.post("/{name}/score", response_model=Answer)
async def score(request: HttpRequest, name: Name, body: ScoreBody) -> Response:
    """Reads as `feed` does, and returns ln p of each token given all before it, and their sum in nats.

    With `pieces`, also the text that is complete with each token. A value that is not finite is null.
    """
    server = server_of(request)
    owner = server.caller(request, "write").name
    if body.vectors is not None:
        raise ServeError(400, "E0506", "request", "vectors have no probabilities", "send text or tokens")
    tokens = server.input(body)
    if body.pieces and server.tokenizer is None:
        raise ServeError(400, "E0110", "request", "the bundle has no tokenizer for pieces", "leave pieces out")
    call = demands(request, "score", body.model_dump(exclude_none=True))
    reading = Feed(tokens, score=True, tokenizer=server.tokenizer if body.pieces else None)
    return answer(await _reads(server, request, owner, name, call, reading, len(tokens)))


@router.post("/{name}/generate", response_model=Answer)
async def generate(request: HttpRequest, name: Name, body: GenerateBody) -> Response:
    """Reads an optional prompt and continues it. With `stream`, as server-sent events.

    Pieces of a streamed reply are provisional until the last event, which has the new position.
    """
    server = server_of(request)
    owner = server.caller(request, "write").name
    if server.session.input_kind != "tokens":
        raise ServeError(400, "E0506", "request", "the bundle takes vectors and generates nothing", "use feed")
    if body.text is not None and body.tokens is not None:
        raise ServeError(400, "E1203", "request", "expected text or tokens, got both", "send one")
    prompt = np.empty(0, np.int32)
    if body.text is not None:
        prompt = server.encode(body.text)
    elif body.tokens is not None:
        prompt = server.tokens(body.tokens)
    limit = server.max_tokens(body.max_tokens)
    # How the reply is sent is no part of the call: a repeated request may choose the other way.
    call = demands(request, "generate", body.model_dump(exclude_none=True, exclude={"stream"}))
    stops = stop_texts(body.stop)
    if stops and server.tokenizer is None:
        raise ServeError(400, "E0110", "request", "the bundle has no tokenizer for stop texts", "leave stop out")
    seed = call.seed if body.seed is None else body.seed
    sampling = Sampling(body.temperature, body.top_k, body.top_p, body.min_p, seed)

    def operation(emit: Emit | None) -> Generate:
        return Generate(prompt, limit, sampling, stops, server.tokenizer, emit)

    if not body.stream:
        return answer(await _reads(server, request, owner, name, call, operation(None), len(prompt) + limit))

    async def run(emit: Emit, control: Control) -> Reply:
        reply = await server.streams.call(owner, name, call, operation(emit), control)
        _charge(server, owner, reply)
        return reply

    events = Events(server, run)
    return await stream_events(request, events, lambda text: {"text": text}, lambda reply: [reply.body])


@router.post("/{name}/mark", response_model=Answer)
async def mark(request: HttpRequest, name: Name) -> Response:
    """Keeps the state at this position, also over a restart."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    return answer(await server.streams.mark(owner, name, demands(request, "mark", {})))


@router.post("/{name}/rewind", response_model=Answer)
async def rewind(request: HttpRequest, name: Name, body: PositionBody) -> Response:
    """Returns to a mark, bit for bit. Later marks are removed."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    call = demands(request, "rewind", body.model_dump())
    return answer(await server.streams.rewind(owner, name, call, body.position))


@router.post("/{name}/unmark", response_model=Answer)
async def unmark(request: HttpRequest, name: Name, body: PositionBody) -> Response:
    """Removes a mark."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    call = demands(request, "unmark", body.model_dump())
    return answer(await server.streams.unmark(owner, name, call, body.position))


@router.post("/{name}/fork", status_code=201, response_model=Answer)
async def fork(request: HttpRequest, name: Name, body: ForkBody | None = None) -> Response:
    """Creates a second, independent stream with the same state."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    body = body or ForkBody()
    call = demands(request, "fork", {"of": name, **body.model_dump()})
    call = Request(call.op, call.body, call.key)
    copy = await server.streams.fork(owner, name)
    new = body.name or _random_name(call)
    return answer(await server.streams.create(owner, new, call, copy, copy.learning), 201)


@router.post("/{name}/freeze", response_model=Answer)
async def freeze(request: HttpRequest, name: Name) -> Response:
    """Stops the learning; the stream still reads."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    return answer(await server.streams.set_learning(owner, name, demands(request, "freeze", {}), False))


@router.post("/{name}/resume", response_model=Answer)
async def resume(request: HttpRequest, name: Name) -> Response:
    """Lets the memory learn again."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    return answer(await server.streams.set_learning(owner, name, demands(request, "resume", {}), True))


@router.post("/{name}/reset", response_model=Answer)
async def reset(request: HttpRequest, name: Name) -> Response:
    """Returns to position 0 with a fresh memory. Marks are removed."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    return answer(await server.streams.reset(owner, name, demands(request, "reset", {})))


@router.post("/{name}/save", response_model=Answer)
async def save(request: HttpRequest, name: Name) -> Response:
    """Writes a snapshot now. Calls are durable without it; it makes the next restart faster."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    body = await server.streams.snapshot(owner, name)
    return answer(Reply(body, body["position"]))


@router.get("/{name}/state", response_class=FileResponse)
async def download_state(request: HttpRequest, name: Name) -> Response:
    """The stream as a state file, NAME.tstate, not encrypted."""
    server = server_of(request)
    owner = server.caller(request, "read").name
    folder = tempfile.TemporaryDirectory(prefix="titans-serve-")
    path = Path(folder.name, "state.tstate")
    try:
        position = await server.streams.download(owner, name, path)
    except BaseException:
        folder.cleanup()
        raise
    headers = {"X-Titans-Position": str(position)}
    return FileResponse(path, filename=f"{name}.tstate", headers=headers, background=BackgroundTask(folder.cleanup))


@router.put("/{name}/state", status_code=201, response_model=Answer)
async def upload_state(request: HttpRequest, name: Name) -> Response:
    """Creates a stream from a state file of the same model."""
    server = server_of(request)
    owner = server.caller(request, "write").name
    with tempfile.TemporaryDirectory(prefix="titans-serve-") as folder:
        path, digest = Path(folder, "state.tstate"), await _receive(server, request, Path(folder, "state.tstate"))
        call = demands(request, "upload", {"sha256": digest})
        stream = await asyncio.to_thread(server.session.restore, path)
        return answer(await server.streams.create(owner, name, call, stream, stream.learning), 201)


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop texts of a request. Raises ServeError."""
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not text or len(text) > 1000 for text in found):
        raise ServeError(400, "E1203", "request", "empty or very long stop text", "send up to 1,000 characters")
    return found


async def _reads(
    server: Server, request: HttpRequest, owner: str, name: str, call: Request, operation: Any, tokens: int
) -> Reply:
    """A call that reads tokens. It is cancelled if the client goes away."""
    control = Control()
    reply = await server.watched(request, control, server.streams.call(owner, name, call, operation, control))
    _charge(server, owner, reply)
    return reply


def _charge(server: Server, owner: str, reply: Reply) -> None:
    if not reply.replayed:
        usage = reply.body.get("usage")
        server.rates.tokens(owner, usage["total_tokens"] if usage else reply.body["tokens"])


def _random_name(call: Request) -> str:
    """A repeated creation with a key gets the same name, so that it finds its stream."""
    return f"s-{secrets.token_hex(12)}" if call.key is None else f"s-{call.seed:016x}"


async def _receive(server: Server, request: HttpRequest, path: Path) -> str:
    """Writes the body to a file, and returns its hash. Raises ServeError beyond the limit."""
    import hashlib

    digest, size, limit = hashlib.sha256(), 0, server.config.max_state_bytes
    with path.open("wb") as file:
        async for block in request.stream():
            size += len(block)
            if size > limit:
                raise ServeError(
                    413, "E1204", "request", f"the state is larger than {limit:,} bytes", "raise the limit"
                )
            digest.update(block)
            file.write(block)
    return digest.hexdigest()
