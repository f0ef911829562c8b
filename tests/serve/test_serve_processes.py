"""Servers in processes of their own: kills, signals, TLS, operators' commands; and requests from the description."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from serving import command, equal, expected, serving, state, write_model

from benchmarks.serving import Served, failed, kill_test
from titans_export.client import Client, ClientError
from titans_export.serve.config import Config
from titans_export.serve.server import Server


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve"))


def test_killed_servers_lose_and_double_nothing(bundle: Path) -> None:
    """A few calls; the long form has two minutes, the benchmark ten."""
    result = kill_test(bundle, seconds=1, streams=3, clients=3, seed=1, pause=1, calls=8)
    assert not failed(result), result
    assert result["kills"] >= 1 and result["calls"] >= 8


@pytest.mark.long
def test_killed_servers_lose_and_double_nothing_in_two_minutes(bundle: Path) -> None:
    result = kill_test(bundle, seconds=120, streams=12, clients=6, seed=2, pause=8)
    assert not failed(result), result
    assert result["kills"] >= 5


def test_the_client_repeats_until_it_is_answered(bundle: Path, tmp_path: Path) -> None:
    """The server starts after the first attempt, and is stopped by SIGTERM with a call in flight."""
    served = Served(bundle, tmp_path / "store", tmp_path / "log")
    client = Client(f"http://127.0.0.1:{served.port}", patience=300, timeout=300)
    starting = threading.Timer(0.3, served.start)
    starting.start()
    stream = client.stream("alice")
    starting.join()
    assert stream.feed("It was")["position"] == 6
    _send_half_requests(served.port)
    assert stream.info()["position"] == 6
    with pytest.raises(ClientError, match="TITANS-E1209") as refused:
        stream.feed("x", if_match=5)
    assert refused.value.body["position"] == 6
    assert stream.mark() == 6
    twin = stream.fork("twin")
    assert len(stream.score([1, 2, 3])["logprobs"]) == 3
    assert stream.generate(max_tokens=3, seed=1)["position"] == 12
    assert stream.rewind(6)["position"] == 6
    assert stream.unmark(6)["unmarked"] == 6
    assert (stream.freeze()["learning"], stream.resume()["learning"]) == (False, True)
    assert [one["name"] for one in client.streams()] == ["alice", "twin"]
    assert twin.info()["position"] == 6 and twin.reset()["position"] == 0 and stream.state()
    twin.delete()
    twin.delete()
    served.end(15)
    assert served.process is not None and served.process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"started", "listening", "request", "stopped"} <= {line["event"] for line in lines}
    impatient = Client(f"http://127.0.0.1:{served.port}", patience=0)
    with pytest.raises(ClientError, match="TITANS-E1251"):
        impatient.stream("alice")


def _send_half_requests(port: int) -> None:
    """A client that ends at each part of a call, and one that promises more or other bytes than it sends."""
    body = b'{"text": "more"}'
    head = b"POST /v1/streams/alice/feed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sized = head + b"Content-Length: %d\r\n\r\n"
    whole = sized % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n10\r\n" + body
    cuts = [whole[:size] for size in (1, 20, len(head), len(whole) - len(body), len(whole) - 1)]
    for sent in (*cuts, sized % 99 + body, chunked, chunked + b"\r\nzz\r\n", sized % 3 + body):
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert b" 200 " not in answer, (sent, answer)


def test_help_of_the_server_loads_nothing_heavy() -> None:
    script = (
        "import sys; from titans_export.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: print(sorted({'fastapi', 'uvicorn', 'pydantic', 'fsspec', 'numpy', 'titans_runtime', 'asyncio'}"
        " & set(sys.modules)), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr.strip() == "[]"
    assert "titans-export serve mac.titans" in done.stdout


def test_operators_list_verify_compact_and_move(bundle: Path, tmp_path: Path) -> None:
    store, secret = tmp_path / "store", tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    with serving(bundle, store) as http:
        for name in ("a", "b", "gone"):
            http.post("/v1/streams", json={"name": name})
            http.post(f"/v1/streams/{name}/feed", json={"text": "private words"}, headers={"Idempotency-Key": name})
            http.post(f"/v1/streams/{name}/mark")
            http.post(f"/v1/streams/{name}/feed", json={"text": "more"})
        http.delete("/v1/streams/gone")
        code, out, err = command("streams", "list", store, "--json")
        assert code == 0, err
        assert [(one["name"], one["position"]) for one in json.loads(out)["streams"]] == [("a", 17), ("b", 17)]
        assert "default/a" in command("streams", "list", store)[1]
        code, out, _ = command("streams", "show", store, "default/a")
        assert code == 0 and "journalled tokens:" in out and "private" not in out
        code, out, err = command("streams", "verify", store, "--bundle", bundle, "--json")
        assert (code, json.loads(out)["damaged"], len(json.loads(out)["good"])) == (0, [], 2), err
        code, out, err = command("streams", "compact", store, "default/a", "--bundle", bundle, "--json")
        assert code == 0, err
        assert http.post("/v1/streams/a/feed", json={"text": "!"}).json()["position"] == 18  # the server reads again
        code, _, err = command("streams", "move", store, "default/a", tmp_path / "other", "default/c",
                               "--target-encryption-key", secret)  # fmt: skip
        assert code == 0, err
        assert http.get("/v1/streams/a").status_code == 404
        assert http.post("/v1/streams/a/feed", json={"text": "!"}).status_code == 404
    with serving(bundle, tmp_path / "other", encryption_key=str(secret)) as http:
        again = http.post("/v1/streams/c/feed", json={"text": "private words"}, headers={"Idempotency-Key": "a"})
        assert again.headers["idempotency-replayed"] == "true"
        calls = [b"private words", b"more", b"!"]
        assert equal(state(http, "c", tmp_path), expected(bundle, tmp_path, calls))
        assert http.post("/v1/streams/c/rewind", json={"position": 13}).json()["position"] == 13
    for args, status, error in (
        (("list", tmp_path), 1, "TITANS-E1220"),
        (("show", store, "default/none"), 1, "TITANS-E1207"),
        (("show", store, "../a"), 1, "TITANS-E1203"),
        (("list", tmp_path / "other"), 2, "TITANS-E1221"),
        (("verify", store, "--bundle", tmp_path), 1, "TITANS-E0201"),
    ):
        code, _, err = command("streams", *args)
        assert error in err and code in (status, 2), (args, err)
    log = max((store / "streams" / "default" / "b").glob("log-*-*"))
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    code, out, err = command("streams", "verify", store)
    assert code == 1 and "0 streams are good, 1 damaged" in out and "TITANS-E1213" in err


def _description(bundle: Path, store: Path) -> Any:
    import schemathesis

    from titans_export.serve.app import create_app

    app = create_app(Server(bundle, Config(store=str(store), max_body_bytes=1 << 16, max_streams=200)))
    return app, schemathesis.openapi.from_dict(app.openapi())


@pytest.mark.parametrize("examples", [1, pytest.param(60, marks=pytest.mark.long)])
def test_requests_from_the_description_find_no_fault(bundle: Path, tmp_path: Path, examples: int) -> None:
    """Random requests of each route, valid and invalid: no answer is 500, and each has a documented form."""
    from fastapi.testclient import TestClient
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.core.result import Ok
    from schemathesis.generation import GenerationMode

    app, schema = _description(bundle, tmp_path / "store")
    seen = set()
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
        for name in ("a", "b"):
            http.post("/v1/streams", json={"name": name})
        operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        for operation, mode in itertools.product(operations, GenerationMode):

            @settings(
                max_examples=examples, deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if case.path_parameters and "name" in case.path_parameters and len(seen) % 2:
                    case.path_parameters["name"] = "a"
                case.headers = {**(case.headers or {}), "Host": "127.0.0.1"}
                answer = http.request(**_request(case))
                seen.add((case.method, case.path, answer.status_code))
                assert answer.status_code < 500 or answer.status_code == 503, (case, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["code"].startswith("TITANS-E"), answer.text

            # Routes without parameters have no invalid requests.
            with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
                check()
    assert len({(method, path) for method, path, _ in seen}) >= 20


def _request(case: Any) -> dict[str, Any]:
    """The request of a case, for a client in this process."""
    given = case.as_transport_kwargs(base_url="http://127.0.0.1")
    return {
        name: given[name] for name in ("method", "url", "headers", "params", "json", "data", "content") if name in given
    }
