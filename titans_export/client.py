"""A client of `titans-export serve` for named streams. It needs the standard library only.

    from titans_export.client import Client

    stream = Client("http://127.0.0.1:8000").stream("alice")     # creates it if there is none
    stream.feed("My name is Alice.")
    print(stream.generate("What is my name?", max_tokens=32)["text"])

Each call has an Idempotency-Key of its own and is repeated with it until it is answered, so it is learned once: also
when the server is killed meanwhile.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .errors import TitansError, error_line

RETRIED = (429, 502, 503, 504)


class ClientError(TitansError):
    """An answer with an error. `status` is that of HTTP, 0 without an answer; `body` has the server's fields."""

    def __init__(self, status: int, message: str, body: dict[str, Any]) -> None:
        code = str(body.get("code", "TITANS-E1251")).removeprefix("TITANS-")
        super().__init__(code, "server", message, "see docs/errors.md")
        self.args = (message,)
        self.status, self.body = status, body


class Client:
    """A server. Any number of threads may use it; each request has a connection of its own."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 60.0,
        patience: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """timeout: seconds for one attempt. patience: seconds for all attempts of a call."""
        self._url, self._key = urllib.parse.urlsplit(url), key
        self._timeout, self._patience, self._sleep = timeout, patience, sleep

    def stream(self, name: str, *, learning: bool = True) -> Stream:
        """The named stream, created if there is none."""
        try:
            self.request("POST", "/v1/streams", {"name": name, "learning": learning})
        except ClientError as error:
            if error.body.get("code") != "TITANS-E1208":
                raise
        return Stream(self, name)

    def streams(self) -> Iterator[dict[str, Any]]:
        """Name, position and times of all streams of the API key, sorted by name."""
        after = ""
        while True:
            query = urllib.parse.urlencode({"after": after})
            page = self.request("GET", f"/v1/streams?{query}")
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1]["name"]

    def request(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, if_match: int | None = None
    ) -> dict[str, Any]:
        """The answer to a request, which is repeated with one Idempotency-Key. Raises ClientError.

        path: with its query. `body` is bytes, or JSON.
        """
        found: dict[str, Any] = json.loads(self.content(method, path, body, key=key, if_match=if_match))
        return found

    def content(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, if_match: int | None = None
    ) -> bytes:
        """The answer's body, as in `request`."""
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        if raw is not None:
            headers["Content-Type"] = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        until, wait = time.monotonic() + self._patience, 0.05
        while True:
            try:
                status, answer, after = self._send(method, path, raw, headers)
                error = _error(status, answer)
            except (OSError, http.client.HTTPException) as failure:
                problem = f"no answer from {self._url.netloc}: {failure or type(failure).__name__}"
                error = ClientError(
                    0, error_line("E1251", "server", problem, "check the URL, and start the server"), {}
                )
                status, answer, after = 0, b"", None
            if error is None:
                return answer
            left = until - time.monotonic()
            if (status and status not in RETRIED) or left <= 0:
                raise error
            # A random wait keeps clients of a restarted server apart.
            self._sleep(min(left, max(after or 0.0, wait * (0.5 + random.random()))))
            wait = min(2 * wait, 2.0)

    def _send(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, float | None]:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "127.0.0.1", self._url.port, timeout=self._timeout)
        try:
            connection.request(method, self._url.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            content, after = answer.read(), answer.headers.get("Retry-After")
            return answer.status, content, float(after) if after and after.isdigit() else None
        finally:
            connection.close()


class Stream:
    """A named stream. Text is str; tokens are integers."""

    def __init__(self, client: Client, name: str) -> None:
        self._client, self.name = client, name
        self._path = f"/v1/streams/{urllib.parse.quote(name, safe='')}"

    def feed(self, content: str | Sequence[int], *, if_match: int | None = None) -> dict[str, Any]:
        """Reads text or tokens. `if_match`: the position that the stream must have."""
        return self._post("feed", _input(content), if_match)

    def score(self, content: str | Sequence[int], *, if_match: int | None = None) -> dict[str, Any]:
        """Reads as `feed`; `logprobs` of the answer has ln p of each token."""
        return self._post("score", _input(content), if_match)

    def generate(
        self, content: str | Sequence[int] = "", *, if_match: int | None = None, **draws: Any
    ) -> dict[str, Any]:
        """Reads and continues. `draws`: max_tokens, temperature, top_k, top_p, min_p, seed, stop."""
        return self._post("generate", {**(_input(content) if content else {}), **draws}, if_match)

    def mark(self) -> int:
        """Keeps the state, and returns its position."""
        return int(self._post("mark")["marked"])

    def rewind(self, position: int) -> dict[str, Any]:
        """Returns to a mark."""
        return self._post("rewind", {"position": position})

    def unmark(self, position: int) -> dict[str, Any]:
        """Removes a mark."""
        return self._post("unmark", {"position": position})

    def fork(self, name: str) -> Stream:
        """A second stream with the same state."""
        self._post("fork", {"name": name})
        return Stream(self._client, name)

    def freeze(self) -> dict[str, Any]:
        """Stops the learning."""
        return self._post("freeze")

    def resume(self) -> dict[str, Any]:
        """Lets the memory learn again."""
        return self._post("resume")

    def reset(self) -> dict[str, Any]:
        """Returns to position 0 with a fresh memory."""
        return self._post("reset")

    def info(self) -> dict[str, Any]:
        """Position, learning, marks, health and sizes."""
        return self._client.request("GET", self._path)

    def state(self) -> bytes:
        """The stream as a state file."""
        return self._client.content("GET", f"{self._path}/state")

    def delete(self) -> None:
        """Removes the stream. A stream that is gone already is not an error."""
        try:
            self._client.request("DELETE", self._path)
        except ClientError as error:
            if error.status != 404:
                raise

    def _post(self, verb: str, body: dict[str, Any] | None = None, if_match: int | None = None) -> dict[str, Any]:
        return self._client.request("POST", f"{self._path}/{verb}", body, if_match=if_match)


def _input(content: str | Sequence[int]) -> dict[str, Any]:
    return {"text": content} if isinstance(content, str) else {"tokens": list(content)}


def _error(status: int, answer: bytes) -> ClientError | None:
    if status < 400:
        return None
    try:
        body: dict[str, Any] = json.loads(answer)["error"]
        return ClientError(status, body["message"], body)
    except (ValueError, KeyError, TypeError):
        problem = f"status {status} without an error of this server"
        return ClientError(status, error_line("E1251", "server", problem, "check the URL"), {})
