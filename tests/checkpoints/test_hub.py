"""Export from the Hugging Face hub, against a stand-in of it on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cli_tools import invoke, spawn

pytest_plugins = ["cli_fixtures"]
pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The two calls that a snapshot needs: the list of a repository's files, and a file."""

    def __init__(self, folder: Path, asked: list[str], *args: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(("/api/models/acme/tiny/revision/", "/api/models/acme/tiny/tree/")):
            if not path.endswith(("/main", "/v1", COMMIT)):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = sorted(file.name for file in self.folder.iterdir())
            siblings = [{"rfilename": name} for name in files]
            tree = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in files]
            answer = tree if "/tree/" in path else {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(answer).encode())
        elif path.startswith("/acme/tiny/resolve/") and (self.folder / path.rpartition("/")[2]).is_file():
            name = path.rpartition("/")[2]
            self.asked.append(name)
            data = (self.folder / name).read_bytes()
            self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of the repository ran')\n")
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        yield {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}, asked
        server.shutdown()


def test_a_repository_is_exported(hub: tuple[dict[str, str], list[str]], tiny_checkpoint: Path, tmp_path: Path) -> None:
    variables, asked = hub
    out = tmp_path / "tiny.titans"
    result = spawn("export", "hf://acme/tiny", "-o", out, "--positions", 8, "--json", **variables)
    assert result.code == 0, result.err
    local = tmp_path / "local.titans"
    assert invoke("export", tiny_checkpoint, "-o", local, "--positions", 8).code == 0
    assert (out / "weights.safetensors").read_bytes() == (local / "weights.safetensors").read_bytes()
    assert set(asked) == {"config.json", "model.safetensors"}, "a file that could run code was fetched"

    missing = spawn("export", "hf://acme/other", "-o", tmp_path / "x.titans", **variables)
    missing.check_failure(1, "TITANS-E0318", "acme/other")
    assert not (tmp_path / "x.titans").exists()


@pytest.mark.parametrize("address", ["hf://acme", "hf://acme/..", "hf://a/b/c", "hf://acme/tiny@", "hf://-x/y"])
def test_a_wrong_address_is_refused(address: str, tmp_path: Path) -> None:
    invoke("export", address, "-o", tmp_path / "x.titans").check_failure(2, "TITANS-E0104", "hf://ORGANISATION/NAME")
