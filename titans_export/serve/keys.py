"""API keys: a TOML file with a digest, a name and scopes for each. The keys themselves are stored nowhere."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import SCOPES
from .errors import ConfigError, ServeError
from .names import is_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ANONYMOUS = "default"


@dataclass(frozen=True)
class Caller:
    """The owner of streams: an API key's name, and its scopes."""

    name: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raises ServeError unless the key has the scope."""
        if scope not in self.scopes:
            raise ServeError(403, "E1202", "keys", f"this API key has no scope {scope}", "use a key that has it")


class Keys:
    """The keys of a file, or one anonymous caller with every scope."""

    def __init__(self, callers: dict[str, Caller] | None) -> None:
        self._callers = callers

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._callers is not None

    def caller(self, authorization: str | None) -> Caller:
        """The caller of a request, by its Authorization header. Raises ServeError."""
        if self._callers is None:
            return Caller(ANONYMOUS, frozenset(SCOPES))
        scheme, _, key = (authorization or "").partition(" ")
        # The digest is compared, so the time of the search shows nothing about the keys.
        found = self._callers.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            problem = "missing API key" if not authorization else "unknown API key"
            raise ServeError(401, "E1201", "keys", problem, "send the header Authorization: Bearer KEY")
        return found


def read_keys(path: str) -> Keys:
    """The keys of a file. Raises ConfigError."""
    try:
        entries = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("keys")
    except OSError as error:
        raise ConfigError("E1219", "keys", f"cannot read {path}: {error.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("E1219", "keys", f"{path} is not TOML: {error}", "correct the file") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError("E1219", "keys", f"{path} has no [[keys]]", "add one with titans-export serve --new-key NAME")
    callers: dict[str, Caller] = {}
    for entry in entries:
        digest, caller = _entry(path, entry)
        if digest in callers:
            raise ConfigError("E1219", "keys", f"{path} has a key twice ({caller.name})", "remove one")
        callers[digest] = caller
    return Keys(callers)


def new_key(name: str, scopes: Iterable[str]) -> tuple[str, str]:
    """A random key, and its entry for the file. Raises ConfigError."""
    key = f"titans-{secrets.token_urlsafe(32)}"
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    entry = {"name": name, "sha256": _digest(key), "scopes": list(scopes)}
    _entry("--new-key", entry)
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{entry["sha256"]}"\nscopes = [{listed}]\n'


def _entry(path: str, entry: Any) -> tuple[str, Caller]:
    if not isinstance(entry, dict) or set(entry) - {"name", "sha256", "scopes"}:
        raise ConfigError("E1219", "keys", f"unknown field of a key in {path}", "give name, sha256 and scopes")
    name, digest, scopes = entry.get("name"), entry.get("sha256"), entry.get("scopes", list(SCOPES))
    if not isinstance(name, str) or not is_name(name):
        raise ConfigError("E1219", "keys", f"invalid name of a key: {name!r}", "use letters, digits, - and _")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError(
            "E1219", "keys", f"invalid sha256 of the key {name}", "use titans-export serve --new-key NAME"
        )
    if not isinstance(scopes, list) or not set(scopes) <= set(SCOPES):
        raise ConfigError("E1219", "keys", f"unknown scope of the key {name}", f"use {', '.join(SCOPES)}")
    return digest, Caller(name, frozenset(scopes))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
