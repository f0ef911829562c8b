"""Runs a server until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from .app import create_app
from .config import Config
from .errors import ConfigError
from .logs import log, log_to_stderr
from .server import Server


class _Announced(uvicorn.Server):
    """Logs the address when it listens, also that of a port the system chose."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or []:
            host, port = one.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            log("listening", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")


def run(bundle: Path, config: Config) -> None:
    """Serves a bundle. A first signal lets running requests end, a second one does not."""
    listening = _listen(config)
    server = Server(bundle, config)
    log_to_stderr()
    settings = uvicorn.Config(
        create_app(server),
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.stop_seconds,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
        lifespan="on",
    )
    if not server.keys.required:
        log("no_api_keys", logging.WARNING, host=config.host)
    # uvicorn raises the signal again after it has stopped gracefully.
    with suppress(KeyboardInterrupt):
        _Announced(settings).run([listening])


def _listen(config: Config) -> socket.socket:
    """The socket, bound before the bundle is opened. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        problem = f"cannot listen on {config.host}, port {config.port}: {error.strerror}"
        raise ConfigError("E1219", "serve", problem, "choose another --host or --port") from None
