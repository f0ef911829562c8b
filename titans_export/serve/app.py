"""The application: routes, limits, metrics and errors around one server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

import titans_runtime as rt

from .. import __version__
from ..errors import TitansError
from . import openai_routes, stream_routes
from .batcher import Cancelled
from .errors import ServeError
from .http import ERRORS, error_response, server_of
from .limits import BodyLimit
from .logs import log
from .page import page
from .schemas import Answer
from .server import Server

_DESCRIPTION = """A Titans model whose memory learns. Without a named stream each request begins with a fresh memory.
Calls of a named stream are journalled before they are answered: with an `Idempotency-Key`, a repeated request is
learned once and gets the first reply. `If-Match` with a position refuses a call on a stream that has gone on."""


def create_app(server: Server) -> FastAPI:
    """The application of a server. It starts and stops the server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await server.stop()

    # The pages of documentation would load scripts of other sites.
    app = FastAPI(
        title="titans-export", version=__version__, description=_DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.server = server
    app.include_router(openai_routes.router)
    app.include_router(stream_routes.router)
    app.add_api_route("/", page, include_in_schema=False)
    app.add_api_route("/health", _health, tags=["server"], response_model=Answer)
    app.add_api_route("/ready", _ready, tags=["server"], response_model=Answer, responses={503: ERRORS[503]})
    app.add_api_route("/metrics", _metrics, tags=["server"], response_class=PlainTextResponse, responses=ERRORS)
    for kind in (ServeError, TitansError, rt.Error, OSError, Cancelled, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(_Watch, server=server)
    app.add_middleware(BodyLimit, config=server.config, refuse=error_response)
    return app


async def _failed(request: HttpRequest, error: Exception) -> Response:
    return error_response(error)


async def _health() -> Response:
    """The process runs."""
    return JSONResponse({"status": "ok"})


async def _ready(request: HttpRequest) -> Response:
    """The server takes requests."""
    if not server_of(request).ready:
        raise ServeError(503, "E1218", "server", "the server is starting or stopping", "try again", retry_after=1)
    return JSONResponse({"status": "ready"})


async def _metrics(request: HttpRequest) -> Response:
    """Metrics of the server and of the runtime, for Prometheus."""
    server = server_of(request)
    server.caller(request, "metrics")
    text = server.metrics.text() + server.session.metrics_text()
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class _Watch:
    """ASGI middleware: counts and logs requests, refuses too many, and answers faults."""

    def __init__(self, app: Any, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        server, started, status = self._server, time.perf_counter(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        limited = scope["path"].startswith("/v1/")
        server.calls += limited
        try:
            if limited and server.calls > server.config.max_calls:
                problem = f"{server.config.max_calls} requests run"
                busy = ServeError(503, "E1206", "server", problem, "send fewer at a time", retry_after=1)
                await error_response(busy)(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Exception as error:
            if status:
                raise
            await error_response(error)(scope, receive, watched)
        finally:
            server.calls -= limited
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            server.metrics.requests.add(route=route, method=_method(scope), status=str(status))
            server.metrics.request_seconds.observe(seconds)
            log("request", method=_method(scope), route=route, status=status, ms=round(seconds * 1e3, 3))


def _method(scope: Any) -> str:
    """The method; any other word would be a metric of its own."""
    method = str(scope["method"])
    return method if method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH") else "other"
