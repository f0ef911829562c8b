"""Settings of the server: flags, then TITANS_SERVE_* variables, then one TOML file, then defaults."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from .errors import ConfigError

PREFIX = "TITANS_SERVE_"
# What an API key may be allowed.
SCOPES = {
    "complete": "completions without a named stream, and the list of models",
    "read": "list, show and download streams",
    "write": "create, feed, score, generate, rewind and delete streams",
    "metrics": "read /metrics",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _setting(default: Any, text: str, low: int | None = None) -> Any:
    return field(default=default, metadata={"help": text, "low": low})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One field per setting. The help of a field is also that of its flag."""

    store: str = _setting("titans-streams", "Folder of the streams, or an fsspec URL.")
    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on; 0: a free one.", 0)
    keys: str = _setting("", "TOML file of API keys; none: no keys, on loopback only.")
    encryption_key: str = _setting("", "File with 32 bytes or 64 hexadecimal digits; encrypts the store.")
    tls_cert: str = _setting("", "Certificate chain (PEM) for HTTPS.")
    tls_key: str = _setting("", "Private key (PEM) of the certificate.")
    device: str = _setting("cpu", "Where to run: cpu, cuda or cuda:N.")
    threads: int = _setting(1, "Threads per call; 0: the backend chooses.", 0)
    batch_threads: int = _setting(0, "Threads of a batch; 0: one per processor.", 0)
    prompt_block: int = _setting(128, "Tokens of a long prompt between two batches.", 1)
    prompts_per_batch: int = _setting(2, "Prompts that advance in one batch, beside all decoding streams.", 1)
    resident_streams: int = _setting(256, "Streams held in memory; others are read from the store.", 1)
    snapshot_calls: int = _setting(64, "Calls of a stream between two snapshots.", 1)
    snapshot_tokens: int = _setting(16384, "Tokens of a stream between two snapshots.", 1)
    keep_snapshots: int = _setting(1, "Older snapshots that are kept.", 0)
    keep_replies: int = _setting(256, "Replies of each stream that are kept for repeated requests.", 1)
    max_body_bytes: int = _setting(4 << 20, "Largest body of a request.", 1024)
    max_state_bytes: int = _setting(1 << 30, "Largest state file that may be uploaded.", 1024)
    max_prompt_tokens: int = _setting(65536, "Most tokens a request may feed.", 1)
    max_generated_tokens: int = _setting(4096, "Most tokens a request may generate.", 1)
    max_streams: int = _setting(1000, "Most named streams of an API key.", 1)
    max_marks: int = _setting(16, "Most marks of a stream.", 1)
    max_calls: int = _setting(256, "Most requests at a time.", 1)
    max_waiting: int = _setting(16, "Most requests at a time for one stream.", 1)
    requests_per_minute: int = _setting(0, "Most requests of an API key per minute; 0: no limit.", 0)
    tokens_per_minute: int = _setting(0, "Most tokens of an API key per minute; 0: no limit.", 0)
    stop_seconds: int = _setting(30, "Time for running requests when the server stops.", 0)
    chat_format: str = _setting("roles", "Text of chat messages: roles (User: ...), or plain.")
    model_name: str = _setting("", "Name of the model in the API; the bundle's name without it.")


@dataclass(frozen=True)
class Loaded:
    """The settings, and where each comes from."""

    config: Config
    sources: dict[str, str]


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> Loaded:
    """The settings that hold. Raises ConfigError for an unknown setting or a wrong value."""
    given = _read(file) if file else {}
    kinds = get_type_hints(Config)
    unknown = sorted(set(given) - set(kinds))
    unknown += sorted(
        name for name in environ if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() not in kinds
    )
    if unknown:
        raise ConfigError("E1219", "config", f"unknown setting {unknown[0]}", "see titans-export serve --print-config")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for one in fields(Config):
        variable = PREFIX + one.name.upper()
        if flags.get(one.name) is not None:
            values[one.name], source = flags[one.name], "flag"
        elif variable in environ:
            values[one.name], source = environ[variable], variable
        elif one.name in given:
            values[one.name], source = given[one.name], str(file)
        else:
            values[one.name], source = one.default, "default"
        sources[one.name] = source
        values[one.name] = _value(one.name, values[one.name], kinds[one.name], one.metadata["low"], source)
    config = Config(**values)
    _check(config)
    return Loaded(config, sources)


def show(loaded: Loaded) -> str:
    """The settings as a TOML file, each with its source."""
    lines = []
    for one in fields(Config):
        value = getattr(loaded.config, one.name)
        lines.append(f"# {one.metadata['help']}  [{loaded.sources[one.name]}]")
        lines.append(f"{one.name} = {json.dumps(value)}\n")
    return "\n".join(lines)


def _read(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        read: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("E1219", "config", f"cannot read {file}: {error.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("E1219", "config", f"{file} is not TOML: {error}", "correct the file") from None
    return read


def _value(name: str, value: Any, kind: type[Any], low: int | None, source: str) -> Any:
    if kind is int and isinstance(value, str):
        with suppress(ValueError):
            value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        problem = f"invalid {name} ({source}): expected {kind.__name__}, got {value!r}"
        raise ConfigError("E1219", "config", problem, "correct the setting")
    if low is not None and value < low:
        problem = f"invalid {name} ({source}): expected at least {low}, got {value}"
        raise ConfigError("E1219", "config", problem, "correct the setting")
    return value


def _check(config: Config) -> None:
    if config.chat_format not in ("roles", "plain"):
        problem = f'invalid chat_format: expected "roles" or "plain", got {config.chat_format!r}'
        raise ConfigError("E1219", "config", problem, "correct the setting")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise ConfigError("E1219", "config", "tls_cert and tls_key belong together", "give both or neither")
    if config.host not in LOOPBACK and not config.keys:
        problem = f"{config.host} is reachable from other machines, and no API keys are set"
        raise ConfigError("E1219", "config", problem, "give --keys FILE, or listen on 127.0.0.1")


def read_secret(path: str) -> bytes:
    """The 32 bytes of a key file: raw, or as 64 hexadecimal digits. Raises ConfigError."""
    try:
        content = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ConfigError("E1219", "config", f"cannot read {path}: {error.strerror}", "check the path") from None
    if len(content) == 32:
        return content
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            "E1219", "config", f"{path} is no key of 32 bytes", "write one with openssl rand -hex 32 > FILE"
        )
    return key
