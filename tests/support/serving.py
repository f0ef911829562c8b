"""A server in this process, on a small model, and what tests compare its streams with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from fastapi.testclient import TestClient
from synthetic import Weights, write_bundle

import titans_runtime as rt
from titans_export.cli import main
from titans_export.serve.app import create_app
from titans_export.serve.config import Config
from titans_export.serve.server import Server
from titans_export.serve.store import Store

URL = "http://127.0.0.1"


def write_model(folder: Path, **options: Any) -> Path:
    """A bundle of bytes whose states depend on every token and on their order."""
    return write_bundle(folder / "leaky.titans", Weights.random(vocab=256), **options)


@contextmanager
def serving(bundle: Path, store: Path | str, given: Store | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a server in this process. The server stops gracefully at the end of the block."""
    config = Config(**{"store": str(store), "batch_threads": 1, "prompt_block": 8, **settings})
    app = create_app(Server(bundle, config, given))
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as client:
        yield client


def killed(client: TestClient) -> None:
    """Leaves the server's streams as a killed process would: nothing is saved."""
    streams = client.app.state.server.streams  # type: ignore[attr-defined]

    async def forget() -> None:
        for entry in list(streams._entries.values()):
            streams._drop(entry)
        streams._entries.clear()

    client.portal.call(forget)  # type: ignore[union-attr]


def state(client: TestClient, name: str, folder: Path, **headers: str) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a stream, downloaded."""
    answer = client.get(f"/v1/streams/{name}/state", headers=headers)
    assert answer.status_code == 200, answer.text
    path = folder / "downloaded.tstate"
    path.write_bytes(answer.content)
    return rt.read_state(path).tensors


def expected(bundle: Path, folder: Path, calls: Sequence[Sequence[int] | bytes], block: int = 8) -> dict[str, Any]:
    """The tensors of a stream that reads the calls in a session without a server."""
    with rt.Session(bundle, threads=1) as session, session.stream() as stream:
        for tokens in calls:
            for start in range(0, len(tokens), block):
                stream.feed(tokens[start : start + block], outputs="none")
        path = folder / "expected.tstate"
        stream.save(path)
        return rt.read_state(path).tensors


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all tensors have the same bits."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def events(answer: Any) -> list[Any]:
    """The data of server-sent events; the end is the text [DONE]."""
    found = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def command(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process. Without the exporter, which takes long to import."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr
