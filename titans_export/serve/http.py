"""What all routes share: headers of requests and replies, events, and errors as JSON."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import titans_runtime as rt

from ..errors import TitansError, error_line
from .batcher import Cancelled
from .errors import ServeError, error_body, store_error
from .logs import log
from .schemas import MAX_INT, ErrorBody
from .server import Events, Server
from .streams import Reply, Request, runtime_status

_STATUSES = {
    400: "Invalid request.",
    401: "Missing or unknown API key.",
    403: "The API key lacks a scope, or the request comes from another site.",
    404: "No such stream, mark or path.",
    409: "The stream exists, has another position, or belongs to another model.",
    413: "The body is too large.",
    422: "The Idempotency-Key belongs to another request, or the guard or the model refuses the tokens.",
    428: "A repeated request without Idempotency-Key.",
    429: "Too many requests or tokens.",
    500: "A damaged file of the store, or a fault of the server.",
    503: "The server is busy or stopping, or the store does not work. Repeat the request.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()
}


def server_of(request: HttpRequest) -> Server:
    """The server that answers a request."""
    found: Server = request.app.state.server
    return found


def demands(request: HttpRequest, op: str, body: Any) -> Request:
    """A call with the demands of its headers. Raises ServeError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= 200 and key.isprintable()):
        problem = "invalid Idempotency-Key"
        raise ServeError(400, "E1203", "request", problem, "send 1 to 200 printable characters")
    if_match = request.headers.get("if-match")
    position = None
    if if_match is not None and if_match.strip() != "*":
        digits = if_match.strip().strip('"')
        if not (digits.isascii() and digits.isdigit() and int(digits[:20]) <= MAX_INT):
            raise ServeError(400, "E1203", "request", "If-Match is not a position", "send the stream's position")
        position = int(digits[:20])
    repeated = request.headers.get("x-stainless-retry-count", "0")
    if repeated not in ("", "0") and key is None and position is None:
        # OpenAI's clients repeat a request by themselves. Without a key it could be learned twice.
        problem = "a repeated request without Idempotency-Key"
        raise ServeError(428, "E1224", "request", problem, "send an Idempotency-Key, or set max_retries=0")
    return Request(op, body, key, position)


def answer(reply: Reply, status: int = 200, body: dict[str, Any] | None = None) -> Response:
    """A reply as JSON, with the stream's position."""
    return JSONResponse(body if body is not None else reply.body, status, headers=headers_of(reply))


def headers_of(reply: Reply) -> dict[str, str]:
    """The headers of a reply about a named stream."""
    found = {"X-Titans-Position": str(reply.position), "ETag": f'"{reply.position}"'}
    return {**found, "Idempotency-Replayed": "true"} if reply.replayed else found


async def stream_events(
    request: HttpRequest,
    events: Events,
    piece: Callable[[str], dict[str, Any]],
    end: Callable[[Reply], list[dict[str, Any]]],
) -> Response:
    """Server-sent events. An error before the first piece is answered with its own status."""
    first = await server_of(request).watched(request, events.control, events.next())

    async def lines() -> AsyncIterator[str]:
        event = first
        try:
            while isinstance(event, str):
                yield _event(piece(event))
                event = await events.next()
            for one in end(event):
                yield _event(one)
            yield "data: [DONE]\n\n"
        except Exception as error:
            status, code, message, details = describe(error)
            log_fault(status, error)
            yield _event(error_body(status, code, message, details))
        finally:
            events.close()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def describe(error: BaseException) -> tuple[int, str, str, dict[str, Any]]:
    """Status, code, message and details of the answer to a failed request."""
    if isinstance(error, ServeError):
        return error.status, error.code, str(error), error.details
    if isinstance(error, rt.Error):
        return runtime_status(error), error.code, str(error), {}
    if isinstance(error, TitansError):  # a text that the tokenizer refuses
        return 400, error.code, str(error), {}
    if isinstance(error, OSError):
        broken = store_error(f"the store does not work: {error.strerror or type(error).__name__}")
        return broken.status, broken.code, str(broken), {}
    if isinstance(error, Cancelled):
        line = error_line("E0509", "request", "the client went away", "send the request again")
        return 499, "TITANS-E0509", line, {}
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        line = error_line("E1203", "request", f"invalid {place}: {first['msg']}", "see /openapi.json")
        return 400, "TITANS-E1203", line, {}
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # a body that cannot be decoded
            return 400, "TITANS-E1203", error_line("E1203", "request", "unreadable body", "send JSON in UTF-8"), {}
        line = error_line("E1222", "request", str(error.detail).lower(), "see /openapi.json")
        return error.status_code, "TITANS-E1222", line, {}
    name = secrets.token_hex(4)
    log("internal_error", logging.ERROR, trace=error, error_id=name)
    line = error_line("E1003", "internal", f"internal error {name}", "see the server's log")
    return 500, "TITANS-E1003", line, {}


def error_response(error: BaseException) -> Response:
    """The answer to a failed request."""
    status, code, message, details = describe(error)
    log_fault(status, error)
    headers = {}
    if isinstance(error, ServeError) and error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, code, message, details), status, headers=headers)


def log_fault(status: int, error: BaseException) -> None:
    """Logs the code of an error of the server's side. The message of such an error has no text of users."""
    if status >= 500:
        log("request_failed", logging.ERROR, status=status, code=getattr(error, "code", ""))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
