"""Named streams over HTTP: learned once, durable, isolated."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import equal, events, expected, killed, serving, state, write_model

import titans_runtime as rt
from titans_export.serve.folder_store import FolderStore
from titans_export.serve.store import End

TEXT = b"It was the best of times, it was the worst of times"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve"))


def feed(client: Any, name: str, text: bytes, **headers: str) -> Any:
    return client.post(f"/v1/streams/{name}/feed", json={"tokens": list(text)}, headers=headers)


def failure(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, in OpenAI's form and with its code."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == f"TITANS-{code}", error
    assert error["message"].endswith(f"(TITANS-{code})")
    assert error["type"]
    return error


def test_a_stream_has_the_bits_of_a_session(bundle: Path, tmp_path: Path) -> None:
    """Fed, generated and scored over HTTP; killed; restored from the journal; restored from a snapshot."""
    with serving(bundle, tmp_path / "store") as client:
        assert client.post("/v1/streams", json={"name": "a"}).status_code == 201
        feed(client, "a", TEXT)
        generated = client.post("/v1/streams/a/generate", json={"max_tokens": 9, "seed": 5, "text": "x"}).json()
        scored = client.post("/v1/streams/a/score", json={"text": "the end"}).json()
        calls = [TEXT, b"x", *([token] for token in generated["tokens"]), b"the end"]
        right = expected(bundle, tmp_path, calls)
        assert equal(state(client, "a", tmp_path), right)
        killed(client)
        assert equal(state(client, "a", tmp_path), right)
    with serving(bundle, tmp_path / "store", prompt_block=3) as client:
        assert client.get("/v1/streams/a").json()["journalled_calls"] == 0
        assert equal(state(client, "a", tmp_path), right)
    with rt.Session(bundle, threads=1) as session, session.stream() as stream:
        stream.feed(TEXT + b"x", outputs="none")
        assert list(stream.generate(max_tokens=9, seed=5)) == generated["tokens"]
        assert np.allclose(stream.score(b"the end"), scored["logprobs"], atol=1e-5)
        assert scored["nats"] == pytest.approx(-sum(scored["logprobs"]))


def test_a_repeated_request_is_learned_once(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", snapshot_calls=3) as client:
        first = client.post("/v1/streams", json={"name": "a"}, headers={"Idempotency-Key": "made"})
        again = client.post("/v1/streams", json={"name": "a"}, headers={"Idempotency-Key": "made"})
        assert (first.json(), again.headers["idempotency-replayed"]) == (again.json(), "true")
        failure(client.post("/v1/streams", json={"name": "a"}), 409, "E1208")
        for number in range(8):  # over snapshots and kills
            key = {"Idempotency-Key": f"call {number}"}
            body = {"text": f"number {number}", "max_tokens": 4}
            answer = client.post("/v1/streams/a/generate", json=body, headers=key)
            if number % 3 == 1:
                killed(client)
            again = client.post("/v1/streams/a/generate", json=body, headers=key)
            assert again.json() == answer.json()
            assert again.headers["idempotency-replayed"] == "true"
            assert answer.json()["position"] == (number + 1) * (len("number 0") + 4)
        old = client.post("/v1/streams/a/generate", json={"text": "number 0", "max_tokens": 4},
                          headers={"Idempotency-Key": "call 0"})  # fmt: skip
        assert old.headers["idempotency-replayed"] == "true"
        failure(feed(client, "a", b"other", **{"Idempotency-Key": "call 0"}), 422, "E1210")
        streamed = client.post(
            "/v1/streams/a/generate",
            json={"text": "number 0", "max_tokens": 4, "stream": True},
            headers={"Idempotency-Key": "call 0"},
        )
        assert events(streamed) == [old.json(), "[DONE]"]
        assert "titans_serve_replayed_replies_total 11" in client.get("/metrics").text


def test_replies_beyond_the_limit_are_forgotten_and_positions_still_protect(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", keep_replies=2) as client:
        client.post("/v1/streams", json={"name": "a"})
        for number in range(4):
            assert feed(client, "a", b"x", **{"Idempotency-Key": str(number), "If-Match": f'"{number}"'}).is_success
        repeated = feed(client, "a", b"x", **{"Idempotency-Key": "0", "If-Match": '"0"'})
        assert failure(repeated, 409, "E1209")["position"] == 4
        assert client.get("/v1/streams/a").headers["etag"] == '"4"'


def test_marks_forks_and_learning(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", max_marks=2) as client:
        client.post("/v1/streams", json={"name": "a", "learning": False})
        assert client.post("/v1/streams/a/resume").json()["learning"] is True
        feed(client, "a", TEXT)
        assert client.post("/v1/streams/a/mark").json()["marked"] == len(TEXT)
        before = state(client, "a", tmp_path)
        assert client.post("/v1/streams/a/freeze").json()["learning"] is False
        feed(client, "a", b"more")
        client.post("/v1/streams/a/mark")
        failure(client.post("/v1/streams/a/generate", json={"max_tokens": 5000}), 400, "E1217")
        feed(client, "a", b"!")
        failure(client.post("/v1/streams/a/mark"), 400, "E1217")
        killed(client)
        assert client.get("/v1/streams/a").json()["marks"] == [len(TEXT), len(TEXT) + 4]
        assert client.post("/v1/streams/a/fork", json={"name": "b"}).json()["position"] == len(TEXT) + 5
        rewound = client.post("/v1/streams/a/rewind", json={"position": len(TEXT)}).json()
        assert (rewound["position"], rewound["learning"]) == (len(TEXT), True)
        assert equal(state(client, "a", tmp_path), before)
        killed(client)
        assert equal(state(client, "a", tmp_path), before)
        client.post("/v1/streams/a/save")
        assert client.post("/v1/streams/a/rewind", json={"position": len(TEXT)}).is_success
        failure(client.post("/v1/streams/a/rewind", json={"position": 3}), 404, "E0408")
        client.post("/v1/streams/a/unmark", json={"position": len(TEXT)})
        assert client.get("/v1/streams/a").json()["marks"] == []
        assert client.get("/v1/streams/b").json()["learning"] is False
        assert client.post("/v1/streams/a/reset").json()["position"] == 0
        killed(client)
        assert client.get("/v1/streams/a").json()["position"] == 0
        feed(client, "a", TEXT)
        assert equal(state(client, "a", tmp_path), expected(bundle, tmp_path, [TEXT]))


def test_deleted_streams_leave_nothing(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store") as client:
        for _ in range(2):
            client.post("/v1/streams", json={"name": "a"})
            feed(client, "a", b"secret words")
            client.post("/v1/streams/a/mark")
            client.post("/v1/streams/a/save")
            failure(client.delete("/v1/streams/a", headers={"If-Match": "3"}), 409, "E1209")
            assert client.delete("/v1/streams/a").json()["deleted"] is True
            failure(client.delete("/v1/streams/a"), 404, "E1207")
            failure(feed(client, "a", b"x"), 404, "E1207")
            kept = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.suffix != ".json"]
            assert {path.name[:4] for path in kept} == {"log-"}
            assert not any(b"tokens" in path.read_bytes() for path in kept)
        assert client.get("/v1/streams").json() == {"object": "list", "data": [], "has_more": False}


def test_states_are_downloaded_and_uploaded(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", max_state_bytes=1 << 16) as client:
        client.post("/v1/streams", json={"name": "a"})
        feed(client, "a", TEXT)
        content = client.get("/v1/streams/a/state").content
        assert client.put("/v1/streams/b/state", content=content).json()["position"] == len(TEXT)
        assert equal(state(client, "b", tmp_path), expected(bundle, tmp_path, [TEXT]))
        failure(client.put("/v1/streams/b/state", content=content), 409, "E1208")
        failure(client.put("/v1/streams/c/state", content=content[:-1]), 400, "E0404")
        failure(client.put("/v1/streams/c/state", content=b"x" * 70000), 413, "E1204")
        failure(client.put("/v1/streams/c/state", content=iter([b"x" * 40000] * 2)), 413, "E1204")


def test_pages_of_streams(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", max_streams=5) as client:
        for name in "edcba":
            client.post("/v1/streams", json={"name": name})
        failure(client.post("/v1/streams", json={"name": "f"}), 400, "E1217")
        page = client.get("/v1/streams", params={"limit": 2, "after": "b"}).json()
        assert ([one["name"] for one in page["data"]], page["has_more"]) == (["c", "d"], True)
        client.delete("/v1/streams/a")
        named = client.post("/v1/streams", headers={"Idempotency-Key": "k"}).json()
        assert client.post("/v1/streams", headers={"Idempotency-Key": "k"}).json() == named


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ".hidden", "a" * 129, "a\x00", "ü", "a.tstate", ""])
def test_names_cannot_leave_the_store(bundle: Path, tmp_path: Path, name: str) -> None:
    with serving(bundle, tmp_path / "store") as client:
        failure(client.post("/v1/streams", json={"name": name}), 400, "E1203")
        given = {"x-session-id": name.encode()}
        answer = client.post("/v1/completions", json={"prompt": "a"}, headers=given)
        failure(answer, 400, "E1203")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_streams_beyond_memory_are_read_again(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", resident_streams=2) as client:
        texts = {name: f"text of {name}".encode() for name in "abcd"}
        for name in texts:
            client.post("/v1/streams", json={"name": name})
        for _ in range(2):
            for name, text in texts.items():
                feed(client, name, text)
        assert client.app.state.server.streams.resident <= 2
        for name, text in texts.items():
            assert equal(state(client, name, tmp_path), expected(bundle, tmp_path, [text, text]))


class Faulty(FolderStore):
    """A folder whose disk is full, or gone, at will."""

    full = gone = False

    def append(self, path: str, end: End, payload: bytes) -> End:
        if self.full:
            with (self._root / path).open("ab") as file:  # a part of the record fits
                file.write(payload[:10])
            raise OSError(28, "No space left on device")
        return super().append(path, end, payload)

    def names(self, folder: str) -> list[str]:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().names(folder)


def test_a_full_disk_and_a_missing_store_lose_and_double_nothing(bundle: Path, tmp_path: Path) -> None:
    store = Faulty(tmp_path / "store")
    with serving(bundle, "", store) as client:
        client.post("/v1/streams", json={"name": "a"})
        feed(client, "a", b"one ")
        store.full = True
        for _ in range(2):
            answer = feed(client, "a", b"two ", **{"Idempotency-Key": "2"})
            failure(answer, 503, "E1212")
            assert answer.headers["retry-after"] == "1"
        assert client.get("/v1/streams/a").json()["position"] == 4
        store.full, store.gone = False, True
        killed(client)
        failure(feed(client, "a", b"two ", **{"Idempotency-Key": "2"}), 503, "E1212")
        failure(client.get("/v1/streams"), 503, "E1212")
        store.gone = False
        assert feed(client, "a", b"two ", **{"Idempotency-Key": "2"}).json()["position"] == 8
        assert equal(state(client, "a", tmp_path), expected(bundle, tmp_path, [b"one ", b"two "]))


class Failing(FolderStore):
    """A folder whose writes fail from a number on, before they do anything or after they have done all."""

    left = 1 << 30
    late = False

    def _write(self, write: Any, *args: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            return write(*args)
        if self.late and self.left == -1:
            write(*args)
        raise OSError(28, "No space left on device")

    def create_log(self, *args: Any) -> End:
        return self._write(super().create_log, *args)

    def append(self, *args: Any) -> End:
        return self._write(super().append, *args)

    def save(self, *args: Any) -> None:
        self._write(super().save, *args)


# Each with what its stream has read when it has read "three" afterwards.
CALLS: dict[str, tuple[str, str, Any, list[bytes]]] = {
    "create": ("POST", "", {"name": "new"}, [b"three"]),
    "feed": ("POST", "/a/feed", {"text": "x"}, [b"one", b"two", b"x", b"three"]),
    "generate": ("POST", "/a/generate", {"text": "x", "max_tokens": 2}, [b"one", b"two", b"x", b"?", b"?", b"three"]),
    "mark": ("POST", "/a/mark", None, [b"one", b"two", b"three"]),
    "rewind": ("POST", "/a/rewind", {"position": 3}, [b"one", b"three"]),
    "unmark": ("POST", "/a/unmark", {"position": 3}, [b"one", b"two", b"three"]),
    "fork": ("POST", "/a/fork", {"name": "new"}, [b"one", b"two", b"three"]),
    "freeze": ("POST", "/a/freeze", None, [b"one", b"two", b"three"]),
    "reset": ("POST", "/a/reset", None, [b"three"]),
    "save": ("POST", "/a/save", None, [b"one", b"two", b"three"]),
    "delete": ("DELETE", "/a", None, [b"three"]),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_store_that_fails_at_any_write(bundle: Path, tmp_path: Path, name: str, late: bool) -> None:
    """The call is answered with 503; repeated with its key it is applied, once."""
    method, path, body, read = CALLS[name]
    for writes in range(9):
        store = Failing(tmp_path / f"store-{writes}")
        with serving(bundle, "", store) as client:

            def call() -> Any:
                return client.request(method, f"/v1/streams{path}", json=body, headers={"Idempotency-Key": "k"})

            client.post("/v1/streams", json={"name": "a"})
            feed(client, "a", b"one")
            client.post("/v1/streams/a/mark")
            feed(client, "a", b"two")
            store.left, store.late = writes, late
            answer = call()
            store.left = 1 << 30
            if answer.is_success:
                break
            failure(answer, 503, "E1212")
            if writes % 2:
                killed(client)
            again = call()
            if name == "delete" and again.status_code == 404:
                failure(again, 404, "E1207")  # it was deleted, although the store reported the opposite
            else:
                assert again.is_success, again.text
            used = "new" if name in ("create", "fork") else "a"
            if name == "delete":
                assert client.post("/v1/streams", json={"name": "a"}).is_success
            if name == "freeze":
                assert client.get("/v1/streams/a").json()["learning"] is False
                client.post("/v1/streams/a/resume")
            if name in ("mark", "unmark"):
                assert client.get("/v1/streams/a").json()["marks"] == ([3, 6] if name == "mark" else [])
            assert feed(client, used, b"three").json()["position"] == len(b"".join(read))
            tokens = iter(again.json()["tokens"] if name == "generate" else ())
            calls = [[next(tokens)] if one == b"?" else one for one in read]
            assert equal(state(client, used, tmp_path), expected(bundle, tmp_path, calls))
    assert answer.is_success and writes > 0


def test_two_servers_that_both_believe_they_own_a_stream(bundle: Path, tmp_path: Path) -> None:
    """Each call goes to the other one, and one of them deletes the stream and makes it again."""
    calls = [f"call {number} ".encode() for number in range(12)]
    with serving(bundle, tmp_path / "s", snapshot_calls=4) as one, serving(bundle, tmp_path / "s") as other:
        one.post("/v1/streams", json={"name": "a"})
        failure(other.post("/v1/streams", json={"name": "a"}), 409, "E1208")
        position = 0
        for number, call in enumerate(calls):
            key = {"Idempotency-Key": str(number)}
            first, second = (one, other) if number % 2 else (other, one)
            position += len(call)
            assert feed(first, "a", call, **key).json()["position"] == position
            assert feed(second, "a", call, **key).headers["idempotency-replayed"] == "true"
        assert feed(one, "a", b"x", **{"If-Match": "3"}).json()["error"]["position"] == position
        assert other.get("/v1/streams/a").json()["position"] == position
        right = expected(bundle, tmp_path, calls)
        assert equal(state(one, "a", tmp_path), right)
        assert equal(state(other, "a", tmp_path), right)
        assert "titans_serve_fenced_total 0" not in one.get("/metrics").text + other.get("/metrics").text
        one.delete("/v1/streams/a")
        one.post("/v1/streams", json={"name": "a"})
        assert feed(other, "a", b"new").json()["position"] == 3


def test_concurrent_calls_are_each_applied_once(bundle: Path, tmp_path: Path) -> None:
    """Many threads on few streams, each call sent twice."""
    with serving(bundle, tmp_path / "store", snapshot_calls=5, resident_streams=2, max_waiting=64) as client:
        for name in "abc":
            client.post("/v1/streams", json={"name": name})
        answers: list[Any] = []

        def work(number: int) -> None:
            for name in "abc":
                body = {"text": f"{number:02d}", "max_tokens": 3}
                for _ in range(2):
                    key = {"Idempotency-Key": f"{number}"}
                    answers.append(client.post(f"/v1/streams/{name}/generate", json=body, headers=key))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(answer.status_code == 200 for answer in answers)
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 24
        for name in "abc":
            assert client.get(f"/v1/streams/{name}").json()["position"] == 8 * 5
            replies = {a.json()["position"]: a.json() for a in answers if a.json()["name"] == name}
            calls: list[Any] = []
            for position in sorted(replies):
                number = next(n for n in range(8) if _reply_of(answers, name, n) == replies[position])
                calls += [f"{number:02d}".encode(), *([token] for token in replies[position]["tokens"])]
            assert equal(state(client, name, tmp_path), expected(bundle, tmp_path, calls))
        assert "titans_serve_batch_streams_count" in client.get("/metrics").text


def _reply_of(answers: list[Any], name: str, number: int) -> Any:
    import json

    for answer in answers:
        if answer.json()["name"] == name and json.loads(answer.request.content)["text"] == f"{number:02d}":
            return answer.json()
    return None


def test_vectors_are_streams_too(tmp_path: Path) -> None:
    bundle = write_model(tmp_path, vectors=True)
    rows = np.random.default_rng(1).normal(size=(11, 256)).astype(np.float32)
    with serving(bundle, tmp_path / "store") as client:
        client.post("/v1/streams", json={"name": "a"})
        answer = client.post("/v1/streams/a/feed", json={"vectors": rows.tolist()})
        assert answer.json()["position"] == 11
        killed(client)
        assert client.get("/v1/streams/a").json()["position"] == 11
        assert equal(state(client, "a", tmp_path), expected(bundle, tmp_path, [rows]))  # type: ignore[list-item]
        failure(client.post("/v1/streams/a/feed", json={"text": "a"}), 400, "E0110")
        failure(client.post("/v1/streams/a/feed", json={"vectors": [[1.0]]}), 400, "E0505")
        failure(client.post("/v1/streams/a/feed", json={"vectors": [[1e300] * 256]}), 400, "E0505")
        failure(client.post("/v1/streams/a/generate", json={}), 400, "E0506")
        failure(client.post("/v1/completions", json={"prompt": "a"}), 400, "E0110")
