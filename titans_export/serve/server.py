"""The parts of a running server, shared by all routes."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import Request as HttpRequest

import titans_runtime as rt

from .. import trust
from ..text.base import Tokenizer, Tokens
from ..tokenizer import open_tokenizer
from .batcher import Batcher, Cancelled
from .config import Config, read_secret
from .errors import ConfigError, ServeError
from .keys import Caller, Keys, read_keys
from .limits import Rates
from .logs import log
from .metrics import Metrics
from .operations import Emit
from .schemas import Input
from .seal import Seal, open_seal
from .store import Store, open_store
from .streams import Control, Reply, Streams

T = TypeVar("T")
Values = TypeVar("Values", bound=npt.NDArray[Any])


class Server:
    """Opens bundle and store; `start` and `stop` run in the server's event loop."""

    def __init__(self, bundle: Path, config: Config, store: Store | None = None, seal: Seal | None = None) -> None:
        """Raises ConfigError, rt.Error, OSError."""
        self.config = config
        self.keys = read_keys(config.keys) if config.keys else Keys(None)
        secret = read_secret(config.encryption_key) if config.encryption_key else None
        self.session = rt.Session(
            bundle,
            device=config.device,
            threads=config.threads,
            batch_threads=config.batch_threads,
            **trust.current().session_options(bundle),
        )
        self.tokenizer = self._tokenizer(bundle)
        self.store = store or open_store(config.store)
        seal = seal or open_seal(self.store, secret)
        if secret is not None:
            self._check_encryption(secret)
        self.metrics, self.rates = Metrics(), Rates(config)
        self.batcher = Batcher(self.session, config.prompts_per_batch, self.metrics.observe_batch)
        self.streams = Streams(self.session, _weights(bundle), self.store, seal, config, self.batcher, self.metrics)
        self.model = config.model_name or str(self.session.info["model"]["name"])
        self.calls, self.ready = 0, False
        gauges = self.metrics.gauges
        gauges["titans_serve_running_calls"] = ("Requests that run.", lambda: self.calls)
        gauges["titans_serve_resident_streams"] = ("Named streams in memory.", lambda: self.streams.resident)

    def start(self) -> None:
        """Starts the batches."""
        self.batcher.start()
        self.ready = True
        log("started", model=self.model, device=self.config.device, keys=self.keys.required)

    async def stop(self) -> None:
        """Saves and closes everything."""
        self.ready = False
        await self.streams.close()
        await asyncio.to_thread(self.batcher.stop)
        self.session.close()
        log("stopped")

    def caller(self, request: HttpRequest, scope: str) -> Caller:
        """The caller of a request, who must have the scope. Raises ServeError."""
        if not self.keys.required:
            _check_origin(request, self.config)
        caller = self.keys.caller(request.headers.get("authorization"))
        caller.require(scope)
        self.rates.request(caller.name)
        return caller

    # Text and tokens

    def encode(self, text: str) -> Tokens:
        """The tokens of a text. Raises ServeError, TextError."""
        if self.tokenizer is None:
            what = "vectors" if self.session.input_kind == "vectors" else "token ids"
            raise ServeError(400, "E0110", "request", "the bundle has no tokenizer", f"send {what}")
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            raise ServeError(400, "E0108", "request", "the text has half a surrogate pair", "send UTF-8") from None
        return self._limited(self.tokenizer.encode(encoded))

    def tokens(self, values: Sequence[int]) -> Tokens:
        """Token ids of a request. Raises ServeError."""
        self._require("tokens")
        tokens = np.asarray(values, np.int32)
        if len(tokens) and int(tokens.max()) >= self.session.vocab_size:
            problem = f"token out of range: expected 0 to {self.session.vocab_size - 1}, got {int(tokens.max())}"
            raise ServeError(400, "E0109", "request", problem, "use the tokenizer of the bundle")
        return self._limited(tokens)

    def input(self, body: Input) -> Any:
        """The tokens or vectors of a request. Raises ServeError."""
        given = [one for one in (body.text, body.tokens, body.vectors) if one is not None]
        if len(given) != 1:
            problem = f"expected one of text, tokens and vectors, got {len(given)}"
            raise ServeError(400, "E1203", "request", problem, "send one")
        if body.text is not None:
            return self.encode(body.text)
        if body.tokens is not None:
            return self.tokens(body.tokens)
        self._require("vectors")
        size = self.session.input_size
        rows = body.vectors or []
        if any(len(row) != size for row in rows):
            raise ServeError(400, "E0505", "request", f"expected vectors of {size} numbers", "send whole vectors")
        with np.errstate(over="ignore"):
            values = np.asarray(rows, np.float32).reshape(-1, size)
        if not np.isfinite(values).all():
            raise ServeError(400, "E0505", "request", "a number is too large for float32", "scale the vectors")
        return self._limited(values)

    def max_tokens(self, asked: int) -> int:
        """The number of tokens to generate. Raises ServeError beyond the limit."""
        if asked > self.config.max_generated_tokens:
            problem = f"expected at most {self.config.max_generated_tokens:,} tokens to generate, got {asked:,}"
            raise ServeError(400, "E1217", "limits", problem, "ask for fewer")
        return asked

    def _require(self, kind: str) -> None:
        if self.session.input_kind != kind:
            problem = f"the bundle takes {self.session.input_kind}, got {kind}"
            raise ServeError(400, "E0506", "request", problem, f"send {self.session.input_kind}")

    def _limited(self, tokens: Values) -> Values:
        if len(tokens) > self.config.max_prompt_tokens:
            problem = f"expected at most {self.config.max_prompt_tokens:,} tokens, got {len(tokens):,}"
            raise ServeError(400, "E1217", "limits", problem, "send them in several requests")
        return tokens

    def _tokenizer(self, bundle: Path) -> Tokenizer | None:
        described = self.session.info["tokenizer"]
        if self.session.input_kind != "tokens" or (described or {}).get("kind") == "none":
            return None
        return open_tokenizer(described, bundle, self.session.vocab_size)

    def _check_encryption(self, secret: bytes) -> None:
        """Saves a stream with the key, so that a missing libcrypto shows now and not at the first request."""
        with tempfile.TemporaryDirectory(prefix="titans-serve-") as folder, self.session.stream() as stream:
            stream.save(Path(folder, "check.tstate"), secret)

    # Calls

    async def watched(self, request: HttpRequest, control: Control, call: Awaitable[T]) -> T:
        """The call's result. It is cancelled if the client goes away; the stream is then as before the call."""
        task = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.metrics.cancelled.add()
                control.cancel()
            return await task
        except asyncio.CancelledError:
            control.cancel()
            with suppress(BaseException):
                await task
            raise
        finally:
            gone.cancel()


class Events:
    """The events of a streamed call: pieces of text, then the reply or an error."""

    def __init__(self, server: Server, call: Callable[[Emit, Control], Awaitable[Reply]]) -> None:
        self._server, self.control = server, Control()
        self._queue: asyncio.Queue[str | Reply | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: str) -> None:
            self.control.shown = True
            loop.call_soon_threadsafe(self._queue.put_nowait, piece)

        async def run() -> None:
            try:
                end: Reply | BaseException = await call(emit, self.control)
            except BaseException as error:
                end = error
            # After the pieces, which the batcher's thread has sent through the loop.
            loop.call_soon(self._queue.put_nowait, end)

        self._task = asyncio.create_task(run())
        self._ended = False

    async def next(self) -> str | Reply:
        """The next event. Raises the call's error."""
        event = await self._queue.get()
        if not isinstance(event, str):
            self._ended = True
        if isinstance(event, BaseException):
            raise event
        return event

    def close(self) -> None:
        """Cancels the call if it has not ended."""
        if not self._ended:
            self._server.metrics.cancelled.add()
            self.control.cancel()


def _weights(bundle: Path) -> str:
    """What state files know a model by: the hash of its checkpoint, else that of the bundle's weights."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    found = manifest["model"].get("weights_sha256")
    return str(found or manifest["files"]["weights.safetensors"]["xxh3_128"])


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_origin(request: HttpRequest, config: Config) -> None:
    """Without keys, a page of another site in a browser on this machine must not reach the server."""
    host = request.headers.get("host", "").rpartition("@")[2]
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    origin = request.headers.get("origin")
    if name.strip("[]") not in ("127.0.0.1", "localhost", "::1", config.host) or (
        origin is not None and origin.partition("://")[2] != host
    ):
        problem = "a request of another site, and the server has no API keys"
        raise ServeError(403, "E1223", "request", problem, "use localhost, or start the server with --keys")


__all__ = ["Cancelled", "ConfigError", "Events", "Server"]
