"""Encryption of a store: each owner has a key of its own, derived from the server's key."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from contextlib import suppress
from typing import Any

from .errors import ConfigError, ServeError
from .store import Store

MARKER = "titans-store.json"
_NONCE_BYTES = 12
_STATE = b"TITANSE1"  # the first bytes of an encrypted state file, docs/state.md


class Seal:
    """Seals the records of one store. Without a key, records are stored as they are."""

    def __init__(self, key: bytes | None, salt: bytes) -> None:
        self._key, self._salt = key, salt

    def owner_key(self, owner: str) -> bytes | None:
        """The 32 bytes that encrypt the owner's streams, None without encryption."""
        if self._key is None:
            return None
        secret = hmac.new(self._salt, self._key, hashlib.sha256).digest()  # HKDF of RFC 5869, one block
        return hmac.new(secret, b"titans-store " + owner.encode() + b"\x01", hashlib.sha256).digest()

    def seal(self, owner: str, context: str, payload: bytes) -> bytes:
        """The record, encrypted and bound to its place."""
        key = self.owner_key(owner)
        if key is None:
            return payload
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + bytes(_aes(key).encrypt(nonce, payload, context.encode()))

    def seal_state(self, owner: str, content: bytes) -> bytes:
        """A plain state file as the owner's files are, in the runtime's format of encrypted files."""
        key = self.owner_key(owner)
        if key is None:
            return content
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _STATE + nonce + bytes(_aes(key).encrypt(nonce, content, _STATE))

    def open_state(self, owner: str, content: bytes) -> bytes:
        """The plain state file. Raises ServeError if it was changed."""
        key = self.owner_key(owner)
        if key is None:
            return content
        body = content[len(_STATE) :]
        try:
            return bytes(_aes(key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], _STATE))
        except Exception:  # the package's own kind
            fix = "restore an older copy of the store"
            raise ServeError(500, "E1213", "store", "a state file does not decrypt", fix) from None

    def open(self, owner: str, context: str, sealed: bytes) -> bytes:
        """The payload. Raises ServeError if the record was changed or moved."""
        key = self.owner_key(owner)
        if key is None:
            return sealed
        try:
            return bytes(_aes(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context.encode()))
        except Exception:  # the package's own kind
            problem = f"a record of {context} does not decrypt"
            fix = "restore an older copy of the store, or start with the key it was written with"
            raise ServeError(500, "E1213", "store", problem, fix) from None


def open_seal(store: Store, key: bytes | None) -> Seal:
    """The seal of a store, which is marked at its first use. Raises ConfigError, OSError."""
    try:
        marker = _read(store)
    except FileNotFoundError:
        if store.names(""):
            problem = f"{store.url} is not empty and not a store of streams"
            raise ConfigError("E1220", "store", problem, "give another place") from None
        salt = secrets.token_bytes(16)
        fresh = {"format": "titans-store", "schema_version": 1, "salt": salt.hex(), "check": _check(key, salt)}
        with suppress(FileExistsError):  # another server was first
            store.create(MARKER, json.dumps(fresh).encode())
        marker = _read(store)
    salt, check = bytes.fromhex(marker["salt"]), marker["check"]
    if check is not None and key is None:
        raise ConfigError("E1221", "store", f"{store.url} is encrypted", "give --encryption-key FILE")
    if check is None and key is not None:
        problem = f"{store.url} is not encrypted, and a key was given"
        raise ConfigError("E1221", "store", problem, "leave the key out, or choose a new place")
    if check != _check(key, salt):
        raise ConfigError("E1221", "store", f"wrong key for {store.url}", "give the key that the store was made with")
    if key is not None:
        _aes(key)
    return Seal(key, salt)


def _read(store: Store) -> dict[str, Any]:
    try:
        marker = json.loads(store.read(MARKER))
        known = marker["format"] == "titans-store" and {"salt", "check"} <= set(marker)
        version = marker.get("schema_version")
    except (ValueError, KeyError, TypeError, AttributeError):
        known, version, marker = False, None, {}
    if not known:
        raise ConfigError("E1220", "store", f"damaged marker {MARKER} in {store.url}", "restore a copy of the file")
    if version != 1:
        problem = f"{store.url} has schema {version}, this version reads 1"
        raise ConfigError("E1220", "store", problem, "install a newer titans-export")
    return dict(marker)


def _check(key: bytes | None, salt: bytes) -> str | None:
    """Shows a wrong key, and nothing about the right one."""
    return None if key is None else hmac.new(key, b"titans-store check" + salt, hashlib.sha256).hexdigest()[:16]


def _aes(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
