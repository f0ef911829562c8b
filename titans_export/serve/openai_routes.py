"""Routes of OpenAI's API: completions and chat, without a memory or with that of a named stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from ..text.base import Tokens
from .errors import ServeError
from .http import ERRORS, answer, demands, server_of, stream_events
from .keys import Caller
from .names import check_name
from .operations import Emit, Generate, Work
from .sampling import Sampling
from .schemas import UNSUPPORTED, Answer, ChatBody, CompletionBody, OpenAiDraws
from .server import Events, Server
from .stream_routes import stop_texts
from .streams import Control, Reply, Request
from .text import chat_prompt, chat_stops

router = APIRouter(prefix="/v1", tags=["openai"], responses=ERRORS)


@router.get("/models", response_model=Answer)
async def list_models(request: HttpRequest) -> Response:
    """The model of this server."""
    server = server_of(request)
    server.caller(request, "complete")
    return JSONResponse({"object": "list", "data": [_model(server)]})


@router.get("/models/{model}", response_model=Answer)
async def show_model(request: HttpRequest, model: str) -> Response:
    """The model of this server."""
    server = server_of(request)
    server.caller(request, "complete")
    _check_model(server, model)
    return JSONResponse(_model(server))


@router.post("/completions", response_model=Answer)
async def complete(request: HttpRequest, body: CompletionBody) -> Response:
    """Continues a prompt. With the header X-Session-Id the named stream reads it, remembers it, and continues."""
    server = server_of(request)
    caller = _caller(server, request)
    _check(server, body)
    if isinstance(body.prompt, list) and body.prompt and isinstance(body.prompt[0], str):
        tokens = server.encode(body.prompt[0])
    elif isinstance(body.prompt, str):
        tokens = server.encode(body.prompt)
    else:
        tokens = server.tokens([token for token in body.prompt if isinstance(token, int)])
    limit = server.max_tokens(16 if body.max_tokens is None else body.max_tokens)
    return await _Completion(
        server, request, caller, body, "text_completion", tokens, limit, stop_texts(body.stop)
    ).run()


@router.post("/chat/completions", response_model=Answer)
async def chat(request: HttpRequest, body: ChatBody) -> Response:
    """Answers messages. With the header X-Session-Id the named stream remembers: send the new messages only."""
    server = server_of(request)
    caller = _caller(server, request)
    _check(server, body)
    form, session = server.config.chat_format, request.headers.get("x-session-id")
    fresh = True
    if session is not None or body.fork is not None:
        name = check_name(session if session is not None else str(body.fork))
        fresh = not await _position(server, caller, name, create=session is not None)
    text = chat_prompt([message.plain() for message in body.messages], form, fresh)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    limit = server.max_tokens(256 if asked is None else asked)
    stops = (*stop_texts(body.stop), *chat_stops(form))
    return await _Completion(server, request, caller, body, "chat.completion", server.encode(text), limit, stops).run()


class _Completion:
    """One completion, of either route."""

    def __init__(
        self,
        server: Server,
        request: HttpRequest,
        caller: Caller,
        body: OpenAiDraws,
        kind: str,
        tokens: Tokens,
        limit: int,
        stops: tuple[str, ...],
    ) -> None:
        self._server, self._request, self._caller, self._body = server, request, caller, body
        self._chat, self._kind, self._stops = kind == "chat.completion", kind, stops
        if server.tokenizer is None:
            raise ServeError(400, "E0110", "request", "the bundle has no tokenizer", "use /v1/streams with tokens")
        self._session = request.headers.get("x-session-id")
        if self._session is not None:
            check_name(self._session)
        described = body.model_dump(exclude_none=True, exclude={"stream", "stream_options"})
        if self._session is not None:
            self._call = demands(request, kind, described)
        else:  # without a named stream a repeated request is harmless
            self._call = Request(kind, described, request.headers.get("idempotency-key"))
        seed = self._call.seed if body.seed is None else body.seed % 2**64
        self._sampling = Sampling(
            1.0 if body.temperature is None else body.temperature,
            body.top_k or 0,
            1.0 if body.top_p is None else body.top_p,
            body.min_p or 0.0,
            seed,
        )
        self._tokens, self._limit = tokens, limit
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    async def run(self) -> Response:
        """The answer, whole or as events."""
        if self._body.stream:
            events = Events(self._server, self._reply)
            return await stream_events(self._request, events, self._piece, self._end)
        control = Control()
        reply = await self._server.watched(self._request, control, self._reply(None, control))
        usage, text, reason = reply.body["usage"], reply.body["text"], reply.body["finish_reason"]
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body = {**self._head(self._kind), "choices": [choice], "usage": usage}
        return answer(reply, body=body) if self._session is not None else JSONResponse(body)

    async def _reply(self, emit: Emit | None, control: Control) -> Reply:
        server, owner = self._server, self._caller.name
        operation = Generate(self._tokens, self._limit, self._sampling, self._stops, server.tokenizer, emit)
        if self._session is not None:
            await server.streams.ensure(owner, self._session)
            reply = await server.streams.call(owner, self._session, self._call, operation, control)
        else:
            if self._body.fork is not None:
                stream = await server.streams.fork(owner, self._body.fork)
            else:
                stream = await asyncio.to_thread(server.session.stream)
            try:
                last = np.empty(0, np.float32) if stream.position else None
                work = Work(stream.position, last, server.config.prompt_block, server.session.vocab_size)
                if stream.position and not len(self._tokens):
                    raise ServeError(400, "E0107", "request", "empty prompt", "give at least one token")
                reply = Reply(await server.streams.run(stream, operation, work, control), work.position)
            finally:
                stream.close()
        if not reply.replayed:
            server.rates.tokens(owner, reply.body["usage"]["total_tokens"])
        return reply

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._server.model}

    def _piece(self, text: str, reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice |= {"delta": {"role": "assistant", "content": text} if text else {}}
        else:
            choice |= {"text": text}
        return {**self._head("chat.completion.chunk" if self._chat else self._kind), "choices": [choice]}

    def _end(self, reply: Reply) -> list[dict[str, Any]]:
        events = [self._piece(reply.body["text"])] if reply.replayed else []
        events.append(self._piece("", reply.body["finish_reason"]))
        options = self._body.stream_options
        if options is not None and options.include_usage:
            kind = "chat.completion.chunk" if self._chat else self._kind
            events.append({**self._head(kind), "choices": [], "usage": reply.body["usage"]})
        return events


async def _position(server: Server, caller: Caller, name: str, create: bool) -> int:
    """The position of a named stream; 0 for one that will be created."""
    try:
        return int((await server.streams.info(caller.name, name))["position"])
    except ServeError as error:
        if create and error.status == 404:
            return 0
        raise


def _caller(server: Server, request: HttpRequest) -> Caller:
    caller = server.caller(request, "complete")
    if request.headers.get("x-session-id") is not None:
        caller.require("write")
    return caller


def _check(server: Server, body: OpenAiDraws) -> None:
    """Refuses what the server would have to ignore."""
    if body.model is not None:
        _check_model(server, body.model)
    for name, value in (body.model_extra or {}).items():
        if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
            raise ServeError(400, "E1216", "request", f"unsupported parameter {name}", "leave it out")


def _check_model(server: Server, model: str) -> None:
    if model not in (server.model, "default"):
        problem = "no such model"
        raise ServeError(404, "E1225", "request", problem, f"use {server.model} or default")


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.model, "object": "model", "created": 0, "owned_by": "titans-export"}
