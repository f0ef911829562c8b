"""The server around streams: OpenAI's API, keys, limits, cancellation, metrics, settings."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import URL, command, equal, events, expected, serving, state, write_model
from test_serve_streams import failure

import titans_runtime as rt
from titans_export.serve.batcher import Batcher, Cancelled, Job, Read
from titans_export.serve.config import Config, load, show
from titans_export.serve.errors import ConfigError
from titans_export.serve.keys import new_key, read_keys
from titans_export.serve.limits import Bucket
from titans_export.serve.sampling import Sampling, log_probabilities, sample
from titans_export.serve.text import StopText, chat_prompt

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve"))


def client_of(http: Any, **options: Any) -> openai.OpenAI:
    """OpenAI's own client, on the server of this process."""
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="any", http_client=http, **options)


def test_the_openai_client_works_unchanged(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store") as http:
        client = client_of(http)
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == model.id == "leaky-sum"
        whole = client.completions.create(model=model.id, prompt="Once", max_tokens=6, seed=3)
        assert whole.usage is not None and whole.usage.total_tokens == 10
        pieces = client.completions.create(model=model.id, prompt="Once", max_tokens=6, seed=3, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        asked: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        chat = client.chat.completions.create(model=model.id, messages=asked, max_tokens=6, seed=3, temperature=0)
        parts = client.chat.completions.create(
            model=model.id, messages=asked, max_tokens=6, seed=3, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        *deltas, last = list(parts)
        assert "".join(d.choices[0].delta.content or "" for d in deltas) == chat.choices[0].message.content
        assert last.usage == chat.usage
        with pytest.raises(openai.NotFoundError, match="TITANS-E1225"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="unsupported parameter n"):
            client.completions.create(model=model.id, prompt="a", n=2)
        assert http.get("/v1/streams").json()["data"] == []


def test_a_session_id_makes_completions_remember(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", chat_format="plain") as http:
        client = client_of(http, default_headers={"X-Session-Id": "talk"})
        asked: Any = [{"role": "user", "content": "Hello"}]
        first = client.chat.completions.create(model="default", messages=asked, max_tokens=4, seed=1)
        again: Any = {"extra_headers": {"Idempotency-Key": "second"}}
        second = client.chat.completions.create(model="default", messages=asked, max_tokens=4, **again)
        repeated = client.chat.completions.create(model="default", messages=asked, max_tokens=4, **again)
        assert repeated.choices == second.choices
        assert first.usage is not None and first.usage.prompt_tokens == 5
        assert http.get("/v1/streams/talk").json()["position"] == 18
        forked = client_of(http).completions.create(
            model="default", prompt="!", max_tokens=3, temperature=0, extra_body={"fork": "talk"}
        )
        assert http.get("/v1/streams/talk").json()["position"] == 18
        with rt.Session(bundle, threads=1) as session:
            path = tmp_path / "talk.tstate"
            path.write_bytes(http.get("/v1/streams/talk/state").content)
            stream = session.restore(path)
            stream.feed(b"!")
            text = bytes(stream.generate(max_tokens=3, temperature=0)).decode("utf-8", "replace")
        assert forked.choices[0].text == text
        retried = {"X-Session-Id": "talk", "x-stainless-retry-count": "1"}
        answer = http.post("/v1/completions", json={"prompt": "a"}, headers=retried)
        failure(answer, 428, "E1224")
        assert http.post("/v1/completions", json={"prompt": "a"}, headers={**retried, "If-Match": "18"}).is_success


def test_streamed_errors_have_their_status_before_the_first_piece(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store") as http:
        body = {"max_tokens": 4, "stream": True}
        failure(http.post("/v1/streams/none/generate", json=body), 404, "E1207")
        http.post("/v1/streams", json={"name": "a"})
        failure(http.post("/v1/streams/a/generate", json=body), 400, "E0107")
        failure(http.post("/v1/streams/a/generate", json={**body, "tokens": [256]}), 400, "E0109")
        half = json.dumps({**body, "text": "\ud800"})
        failure(http.post("/v1/streams/a/generate", content=half, headers=JSON), 400, "E0108")
        answer = http.post("/v1/streams/a/generate", json={**body, "text": "a", "stop": "\x00" * 5, "seed": 1})
        *pieces, end, done = events(answer)
        assert "".join(piece["text"] for piece in pieces) == end["text"]
        assert (end["position"], end["finish_reason"], done) == (5, "length", "[DONE]")


def test_bad_requests_are_documented_errors(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", max_body_bytes=1024, max_prompt_tokens=20) as http:
        http.post("/v1/streams", json={"name": "a"})
        path = "/v1/streams/a/feed"
        for body in ({}, {"text": "a", "tokens": [1]}, {"text": 3}, {"tokens": [-1]}, {"tokens": [True]}, {"more": 1}):
            failure(http.post(path, json=body), 400, "E1203")
        for content in (b"", b"{", b'{"tokens": [NaN]}', b"\xff", b"[" * 900):
            failure(http.post(path, content=content, headers=JSON), 400, "E1203")
        failure(http.post(path, json={"text": "x" * 2000}), 413, "E1204")
        failure(http.post(path, content=iter([b"x" * 700] * 2)), 413, "E1204")
        failure(http.post(path, json={"text": "x" * 21}), 400, "E1217")
        for header in ({"If-Match": "x"}, {"If-Match": "9" * 30}, {"Idempotency-Key": "k" * 201}):
            failure(http.post(path, json={"text": "a"}, headers=header), 400, "E1203")
        failure(http.post(path, json={"text": "a"}, headers={"If-Match": "1"}), 409, "E1209")
        assert http.post(path, json={"text": "a"}, headers={"If-Match": "*"}).json()["position"] == 1
        failure(http.get("/v1/nothing"), 404, "E1222")
        failure(http.put("/v1/streams/a/feed"), 405, "E1222")
        failure(http.get("/v1/streams", headers={"Host": "evil.example"}), 403, "E1223")
        failure(http.get("/v1/streams", headers={"Origin": "http://evil.example"}), 403, "E1223")
        assert http.get("/v1/streams", headers={"Origin": "http://127.0.0.1"}).is_success
        assert (http.get("/health").json(), http.get("/ready").json()) == ({"status": "ok"}, {"status": "ready"})


def test_keys_separate_their_streams_and_scopes(bundle: Path, tmp_path: Path) -> None:
    keys, entries = {}, []
    for name, scopes in (("alice", ("read", "write")), ("bob", ("read", "write")), ("eve", ("read", "complete"))):
        keys[name], entry = new_key(name, scopes)
        entries.append(entry)
    file = tmp_path / "keys.toml"
    file.write_text("".join(entries))
    alice, bob, eve = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    with serving(bundle, tmp_path / "store", keys=str(file), encryption_key=str(secret)) as http:
        http.post("/v1/streams", json={"name": "a"}, headers=alice)
        http.post("/v1/streams/a/feed", json={"text": "hidden"}, headers=alice)
        http.post("/v1/streams/a/save", headers=alice)
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": keys["alice"]}):
            answer = http.get("/v1/streams/a", headers=header)
            failure(answer, 401, "E1201")
            assert answer.headers["www-authenticate"] == "Bearer"
        # Every route with a name, so that a new one is tested too. An upload creates a stream of the caller.
        bodies = {"rewind": {"position": 0}, "unmark": {"position": 0}, "feed": {"text": "x"}, "score": {"text": "x"}}
        bodies["generate"] = {"text": "x"}
        asked = 0
        for path, methods in http.app.openapi()["paths"].items():  # type: ignore[attr-defined]
            for method in methods if path.startswith("/v1/streams/{name}") else ():
                if method == "put":
                    continue
                for name in ("a", "none"):
                    target, verb = path.replace("{name}", name), path.rpartition("/")[2]
                    answer = http.request(method.upper(), target, json=bodies.get(verb), headers=bob)
                    failure(answer, 404, "E1207")
                asked += 1
        assert asked >= 14
        forked = {"prompt": "x", "fork": "a"}
        failure(
            http.post("/v1/completions", json=forked, headers={"Authorization": eve["Authorization"]}), 404, "E1207"
        )
        assert http.get("/v1/streams", headers=bob).json()["data"] == []
        assert http.post("/v1/streams", json={"name": "a"}, headers=bob).status_code == 201
        failure(http.post("/v1/streams", json={"name": "a"}, headers=eve), 403, "E1202")
        failure(http.post("/v1/completions", json={"prompt": "a"}, headers=alice), 403, "E1202")
        failure(http.post("/v1/completions", json={"prompt": "a"}, headers={**eve, "X-Session-Id": "a"}), 403, "E1202")
        failure(http.get("/metrics", headers=alice), 403, "E1202")
        assert equal(state(http, "a", tmp_path, **alice), expected(bundle, tmp_path, [b"hidden"]))
    kept = [path.read_bytes() for path in (tmp_path / "store" / "streams").rglob("*") if path.is_file()]
    assert kept and not any(b"tokens" in content or b"safetensors" in content for content in kept)
    assert any(content.startswith(b"TITANSE1") for content in kept)


def test_limits_of_rate_and_number(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store", requests_per_minute=3) as http:
        assert [http.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert int(http.get("/v1/models").headers["retry-after"]) >= 1
    with serving(bundle, tmp_path / "store", tokens_per_minute=10) as http:
        assert http.post("/v1/completions", json={"prompt": "a" * 12, "max_tokens": 1}).is_success
        failure(http.post("/v1/completions", json={"prompt": "a"}), 429, "E1205")
    with serving(bundle, tmp_path / "store", max_calls=1) as http:
        http.app.state.server.calls = 1
        failure(http.get("/v1/models"), 503, "E1206")
        assert http.get("/health").is_success


def test_buckets_refill_by_a_monotonic_clock() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    assert bucket.take(60) == 0
    assert bucket.take(30) == pytest.approx(30, abs=0.01)
    now[0] = 30
    assert bucket.take(30) == 0
    bucket.charge(60)
    assert bucket.take(1) == pytest.approx(61, abs=0.01)


def test_clocks_that_jump_change_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"Idempotency-Key": "k"}
    with serving(bundle, tmp_path / "store", snapshot_calls=1) as http:
        http.post("/v1/streams", json={"name": "a"})
        http.post("/v1/streams/a/feed", json={"text": "one"}, headers=key)
        for years in (-30, 30):
            monkeypatch.setattr(
                "titans_export.serve.streams.now", lambda years=years: f"{2026 + years}-01-01T00:00:00Z"
            )
            answer = http.post("/v1/streams/a/feed", json={"text": "one"}, headers=key)
            assert answer.headers["idempotency-replayed"] == "true"
            http.post("/v1/streams/a/feed", json={"text": "x"})
        assert http.get("/v1/streams/a").json()["position"] == 5
        assert equal(state(http, "a", tmp_path), expected(bundle, tmp_path, [b"one", b"x", b"x"]))


async def _leave(app: Any, path: str, body: dict[str, Any], after: int) -> list[Any]:
    """A request whose client goes away after so many messages of the answer; 0: before any."""
    sent: list[Any] = []
    gone = asyncio.Event()
    if not after:
        asyncio.get_running_loop().call_later(0.05, gone.set)
    delivered = False

    async def receive() -> dict[str, Any]:
        nonlocal delivered
        if not delivered:
            delivered = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if after and len(sent) >= after:
            gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_leaves_the_stream_as_before(bundle: Path, tmp_path: Path, stream: bool) -> None:
    with serving(bundle, tmp_path / "store") as http:
        http.post("/v1/streams", json={"name": "a"})
        http.post("/v1/streams/a/feed", json={"text": "before"})
        body = {"text": "more", "max_tokens": 4096, "stream": stream}
        http.portal.call(_leave, http.app, "/v1/streams/a/generate", body, 3 * stream)  # type: ignore[union-attr]
        until = time.monotonic() + 10
        while "titans_serve_cancelled_total 1" not in http.get("/metrics").text and time.monotonic() < until:
            time.sleep(0.01)
        assert http.get("/v1/streams/a").json()["position"] == 6
        assert equal(state(http, "a", tmp_path), expected(bundle, tmp_path, [b"before"]))
        assert http.app.state.server.calls == 0


def test_a_long_prompt_does_not_stop_decoding_streams(bundle: Path) -> None:
    """In each round every decoding stream reads a token, and one prompt a block."""
    rounds: list[tuple[int, int]] = []
    with rt.Session(bundle, threads=1, batch_threads=1) as session:
        batcher = Batcher(session, 1, lambda streams, tokens: rounds.append((streams, tokens)))

        def prompt(blocks: int) -> Any:
            for _ in range(blocks):
                yield Read(np.zeros(8, np.int32))

        def decode(count: int) -> Any:
            for _ in range(count):
                yield Read(np.zeros(1, np.int32))
            return count

        jobs = [Job(session.stream(), steps) for steps in (prompt(5), prompt(5), decode(4), decode(12))]
        for job in jobs:
            batcher.submit(job)
        batcher.start()
        assert [job.done.result(30) for job in jobs] == [None, None, 4, 12]
        assert rounds == [(3, 10)] * 4 + [(2, 9)] * 6 + [(1, 1)] * 2
        bad, good = Job(session.stream(), iter_bad()), Job(session.stream(), decode(2))
        stopped = Job(session.stream(), decode(10**9))
        for job in (bad, good, stopped):
            batcher.submit(job)
        with pytest.raises(rt.Error, match="TITANS-E0504"):
            bad.done.result(30)
        assert good.done.result(30) == 2
        stopped.cancel()
        with pytest.raises(Cancelled):
            stopped.done.result(30)
        batcher.stop()


def iter_bad() -> Any:
    yield Read(np.array([999], np.int32))


def test_sampling_draws_the_tokens_of_the_runtime(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    with rt.Session(bundle, threads=1) as session:
        for case in range(24):
            options: dict[str, Any] = {
                "temperature": float(rng.choice([0, 0.3, 1, 2])), "top_k": int(rng.choice([0, 1, 5, 300])),
                "top_p": float(rng.choice([1, 0.9, 0.2])), "min_p": float(rng.choice([0, 0.05, 1])), "seed": case,
            }  # fmt: skip
            prompt = bytes(rng.integers(0, 256, 5).tolist())
            runtime, ours = session.stream(), session.stream()
            runtime.feed(prompt)
            logits = ours.feed(prompt, outputs="last")
            found = []
            for index in range(8):
                assert logits is not None
                found.append(sample(logits, Sampling(**options), index))
                logits = ours.step(found[-1])
            assert found == list(runtime.generate(max_tokens=8, **options)), options
        stream = session.stream()
        rows = stream.feed(b"abcdef")
        stream.reset()
        right = stream.score(b"abcdef")[1:]
        assert rows is not None
        assert np.allclose(log_probabilities(rows[:-1], np.frombuffer(b"bcdef", np.uint8)), right, atol=1e-6)


def test_stop_texts_are_found_over_pieces() -> None:
    for text in ("abcSTOPdef", "aSTSTOP", "STO", "", "xSTOPS", "no end"):
        for cut in range(1, 4):
            writer, shown = StopText(["STOP", "end"]), ""
            for start in range(0, len(text), cut):
                shown += writer.add(text[start : start + cut])
                assert "STOP" not in shown
            right = text.partition("STOP")[0].partition("end")[0]
            assert shown + writer.rest() == right
            assert writer.stopped == ("STOP" in text or "end" in text)


def test_chat_texts() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert chat_prompt(messages, "roles", True) == "System: s\nUser: u\nAssistant:"
    assert chat_prompt(messages, "roles", False).startswith("\nSystem")
    assert chat_prompt(messages, "plain", False) == "s\nu"


def test_metrics_join_those_of_the_runtime(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store") as http:
        http.post("/v1/streams", json={"name": "a"})
        http.post("/v1/streams/a/feed", json={"text": "abc"})
        http.request("BREW", "/v1/streams")
        families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    requests = {sample.labels["route"] for sample in families["titans_serve_requests"].samples}
    assert "/v1/streams/{name}/feed" in requests
    assert families["titans_serve_journal_seconds"].samples[-1].value == 1
    assert families["titans_tokens"].samples[0].value == 3
    assert families["titans_serve_resident_streams"].samples[0].value == 1


def test_logs_have_no_text_of_users(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "titans_export.serve"), serving(bundle, tmp_path / "store") as http:
        http.post("/v1/streams", json={"name": "person"})
        http.post("/v1/streams/person/feed", json={"text": "private"})
        http.post("/v1/streams/person/feed", json={"text": ["private"]})
    lines = [json.dumps([record.getMessage(), record.__dict__.get("fields")]) for record in caplog.records]
    assert any("/v1/streams/{name}/feed" in line for line in lines)
    assert not any("private" in line or "person" in line for line in lines)


def test_settings_come_from_flags_variables_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nstore = "from file"\nthreads = 3\n')
    loaded = load({"port": 3, "host": None}, {"TITANS_SERVE_PORT": "2", "TITANS_SERVE_THREADS": "4"}, file)
    config = loaded.config
    assert (config.port, config.threads, config.store, config.host) == (3, 4, "from file", "127.0.0.1")
    printed = tmp_path / "printed.toml"
    printed.write_text(show(loaded))
    assert load({}, {}, printed).config == config
    for environ, content, problem in (
        ({"TITANS_SERVE_NOPE": "1"}, "", "unknown setting TITANS_SERVE_NOPE"),
        ({"TITANS_SERVE_PORT": "x"}, "", "expected int"),
        ({}, "nope = 1", "unknown setting nope"),
        ({}, "port = true", "expected int"),
        ({}, "port = -1", "at least 0"),
        ({}, "port =", "is not TOML"),
        ({}, 'host = "0.0.0.0"', "no API keys"),
        ({}, 'tls_cert = "a"', "belong together"),
        ({}, 'chat_format = "a"', "chat_format"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            load({}, environ, file)
    with pytest.raises(ConfigError, match="cannot read"):
        load({}, {}, tmp_path / "none")


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    for content in ("", "x", "[[keys]]", '[[keys]]\nname="a"\nsha256="0"', '[[keys]]\nname="../a"\nsha256="0"'):
        file.write_text(content)
        with pytest.raises(ConfigError, match="TITANS-E1219"):
            read_keys(str(file))
    key, entry = new_key("a", ("read",))
    file.write_text(entry)
    assert read_keys(str(file)).caller(f"Bearer {key}").scopes == {"read"}
    assert key not in entry
    file.write_text(entry * 2)
    with pytest.raises(ConfigError, match="twice"):
        read_keys(str(file))


def test_the_command_prints_settings_and_keys(tmp_path: Path) -> None:
    code, out, _ = command("serve", "--print-config", "--port", "9")
    assert code == 0 and "port = 9" in out
    _, out, err = command("serve", "--new-key", "alice", "--scope", "read")
    assert 'name = "alice"' in out and "titans-" in err
    for status, error, args in (
        (2, "TITANS-E0103", ()),
        (2, "TITANS-E1219", ("none.titans", "--host", "0.0.0.0")),
        (1, "TITANS-E0201", (tmp_path / "none.titans", "--store", tmp_path / "store", "--port", 0)),
    ):
        code, _, err = command("serve", *args)
        assert (code, err.count("\n")) == (status, 1)
        assert error in err
    assert Config().host == "127.0.0.1"
