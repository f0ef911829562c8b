"""Limits on requests: their number, their rate, and the size of bodies before anything parses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .config import Config
from .errors import ServeError


class Bucket:
    """A token bucket: `rate` units per minute, all of which may come at once. Clock: a monotonic one."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._level, self._time = float(rate), clock()

    def take(self, amount: float) -> float:
        """Takes the amount and returns 0, or the seconds until it may be taken. Beyond the rate it never may."""
        now = self._clock()
        self._level = min(self._rate, self._level + (now - self._time) * self._rate / 60)
        self._time = now
        if amount <= self._level:
            self._level -= amount
            return 0.0
        return (min(amount, self._rate) - self._level) * 60 / self._rate + 0.001

    def charge(self, amount: float) -> None:
        """Takes an amount that was used already; the level may become negative."""
        self.take(0)
        self._level -= amount


class Rates:
    """The buckets of all API keys."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def request(self, caller: str) -> None:
        """Counts a request. Raises ServeError beyond the rate."""
        if self._config.requests_per_minute:
            self._raise(self._bucket(caller, "requests", self._config.requests_per_minute).take(1), "requests")
        if self._config.tokens_per_minute:
            self._raise(self._bucket(caller, "tokens", self._config.tokens_per_minute).take(0.5), "tokens")

    def tokens(self, caller: str, count: int) -> None:
        """Charges tokens that a request used. The next ones wait until the level is positive again."""
        if self._config.tokens_per_minute:
            self._bucket(caller, "tokens", self._config.tokens_per_minute).charge(count)

    def _bucket(self, caller: str, what: str, rate: int) -> Bucket:
        key = (caller, what)
        if key not in self._buckets:
            self._buckets[key] = Bucket(rate, self._clock)
        return self._buckets[key]

    def _raise(self, wait: float, what: str) -> None:
        if wait:
            problem = f"too many {what} per minute with this API key"
            raise ServeError(429, "E1205", "limits", problem, "wait as Retry-After demands", retry_after=wait)


class BodyLimit:
    """ASGI middleware: refuses a body beyond its limit while it arrives, before anything reads it as JSON."""

    def __init__(self, app: Any, config: Config, refuse: Callable[[ServeError], Any]) -> None:
        self._app, self._config, self._refuse = app, config, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes requests on with their body, read whole."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["method"] == "PUT" and scope["path"].endswith("/state")
        limit = self._config.max_state_bytes if state else self._config.max_body_bytes
        too_large = ServeError(
            413, "E1204", "request", f"the body is larger than {limit:,} bytes", "send it in several requests"
        )
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limit:
            await self._refuse(too_large)(scope, receive, send)
            return
        if state:  # streamed to a file, which counts its bytes
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                await self._refuse(too_large)(scope, receive, send)
                return
        sent = False

        async def replay() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)
