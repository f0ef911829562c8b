"""Errors of the server, each with a code, an HTTP status and the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from ..errors import TitansError, UsageError

# What OpenAI's clients call an error, by its status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ServeError(TitansError):
    """An error that a request is answered with.

    `retry_after` is in seconds, None if a retry does not help. `details` are further fields of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        where: str,
        problem: str,
        fix: str,
        *,
        retry_after: float | None = None,
        **details: Any,
    ) -> None:
        super().__init__(code, where, problem, fix)
        self.status, self.retry_after, self.details = status, retry_after, details


class ConfigError(UsageError):
    """A setting of the server that cannot be used."""


class Fenced(Exception):
    """Another server has appended to the stream's log since this one read it."""


class DamagedLog(Exception):
    """A record that was acknowledged is damaged."""


def error_body(status: int, code: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer to a failed request, in OpenAI's form."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **(details or {})}}


def store_error(problem: str) -> ServeError:
    """The store cannot be read or written. Nothing was acknowledged."""
    return ServeError(
        503,
        "E1212",
        "store",
        problem,
        "free space or repair the store, and repeat the request with the same Idempotency-Key",
        retry_after=1,
    )


# Codes of the runtime that a request causes, and the status of the answer. All others are faults of the server.
RUNTIME_STATUS = {
    "TITANS-E0109": 400,
    "TITANS-E0108": 400,
    "TITANS-E0107": 400,
    "TITANS-E0401": 400,
    "TITANS-E0402": 400,
    "TITANS-E0403": 400,
    "TITANS-E0404": 400,
    "TITANS-E0405": 400,
    "TITANS-E0406": 400,
    "TITANS-E0407": 400,
    "TITANS-E0408": 404,
    "TITANS-E0501": 400,
    "TITANS-E0504": 400,
    "TITANS-E0505": 400,
    "TITANS-E0506": 400,
    "TITANS-E0510": 422,
    "TITANS-E0511": 422,
    "TITANS-E0512": 400,
}
