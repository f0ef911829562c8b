"""The page at /, its headers, and in a real browser."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from browser import PROGRAM, Page, browser
from serving import equal, serving, write_model

import titans_runtime as rt
from benchmarks.serving import Served
from titans_export.client import Client
from titans_export.serve.keys import new_key


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve"))


TEXT = "Grüße, 🐢!\nonce more"


def test_the_page_is_one_file_that_allows_nothing_else(bundle: Path, tmp_path: Path) -> None:
    """It is served without an API key, because it holds no data."""
    keys = tmp_path / "keys.toml"
    keys.write_text(new_key("a", ("read",))[1])
    with serving(bundle, tmp_path / "store", keys=str(keys)) as http:
        answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert all(re.fullmatch("'sha256-[A-Za-z0-9+/=]{44}'", policy[f"{kind}-src"]) for kind in ("script", "style"))
    assert answer.headers["x-content-type-options"] == "nosniff"
    # Neither attributes that the policy would refuse, nor HTML made from data, nor other places.
    assert not re.search(r'style="|\son\w+="|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(', answer.text)
    assert set(re.findall(r"https?://[^\"' ]+", answer.text)) == {"http://www.w3.org/2000/svg"}


def test_scored_pieces_are_the_text(bundle: Path, tmp_path: Path) -> None:
    """A character of several bytes belongs to its last token. The surprise is that of a session."""
    with serving(bundle, tmp_path / "store") as http:
        http.post("/v1/streams", json={"name": "a"})
        answer = http.post("/v1/streams/a/score", json={"text": TEXT, "pieces": True}).json()
        assert "".join(answer["pieces"]) == TEXT
        assert answer["pieces"][2:5] == ["", "ü", ""]
        cut = http.post("/v1/streams/a/score", json={"tokens": [65, 0xC3], "pieces": True}).json()
        assert cut["pieces"] == ["A", "\N{REPLACEMENT CHARACTER}"]
        assert http.post("/v1/streams/a/score", json={"text": "", "pieces": True}).json()["pieces"] == []
    with rt.Session(bundle, threads=1) as session, session.stream() as stream:
        right = stream.score(TEXT.encode())
    assert answer["logprobs"] == pytest.approx(right.tolist(), abs=1e-4)
    raw = write_model(tmp_path, vectors=True)
    with serving(raw, tmp_path / "other") as http:
        http.post("/v1/streams", json={"name": "a"})
        assert http.post("/v1/streams/a/score", json={"tokens": [1], "pieces": True}).status_code == 400


@pytest.mark.long
@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")
def test_the_page_in_a_browser(bundle: Path, tmp_path: Path) -> None:
    """Open, read, surprise, freeze, mark, fork, rewind, continue; a killed server; a reload; narrow and dark."""
    served = Served(bundle, tmp_path / "store", tmp_path / "log")
    served.start()
    url = f"http://127.0.0.1:{served.port}/"
    client = Client(url, patience=60)
    try:
        with browser(tmp_path / "profile") as page:
            page.shape(1100, 800)
            page.open(url)
            page.wait("model.textContent === 'leaky-sum' && !none.hidden")
            page.type("#name", "alice")
            page.press("Enter")
            page.wait("!stream.hidden && title.textContent === 'alice'")

            page.type("#input", TEXT)
            page.click("#read")
            size = len(TEXT.encode())
            page.wait(f"info.position === {size} && !busy")
            tokens = page.evaluate(
                "[...document.querySelectorAll('.token')].map(e => [e.textContent, +e.dataset.bits])"
            )
            _check_surprise(bundle, tokens)
            heat = page.evaluate(
                "[...document.querySelectorAll('.token')].map(e => e.style.getPropertyValue('--heat'))"
            )
            assert len(set(heat)) >= 3
            assert (
                page.evaluate("getComputedStyle(document.querySelector('.token')).backgroundColor")
                != "rgba(0, 0, 0, 0)"
            )
            page.evaluate("document.getElementById('text').focus()")
            page.press("ArrowRight")
            page.press("ArrowRight")
            assert page.evaluate("detail.textContent").startswith('"r": ')
            assert page.evaluate("document.querySelectorAll('#norms polyline').length") == 2
            page.screenshot(tmp_path / "wide.png")

            page.click("#mark")
            page.wait("document.querySelector('[data-rewind]')")
            page.click("#learn")
            page.wait("!busy && learn.textContent === 'Let it learn'")
            assert client.stream("alice").info()["learning"] is False
            before = _state(client, "alice", tmp_path)
            page.click("#fork")
            page.wait("dialog.open")
            page.press("Escape")
            page.wait("!dialog.open")
            page.click("#fork")
            page.type("#reply", "twin")
            page.press("Enter")
            page.wait("title.textContent === 'twin' && !busy")
            assert equal(_state(client, "twin", tmp_path), before)

            page.type("#count", "5")
            page.type("#input", "More")
            page.click("#generate")
            page.wait(f"info.position === {size} + 9 && !busy")
            page.evaluate("location.hash = 'alice'")
            page.wait("title.textContent === 'alice' && !busy")
            assert page.evaluate("document.querySelectorAll('.token').length") == len(tokens)

            # Another client has gone on: nothing is read, and the text stays in its field.
            client.stream("alice").feed("!")
            page.type("#input", "late")
            page.click("#read")
            page.wait("!problem.hidden && problem.textContent.includes('TITANS-E1209')")
            assert page.evaluate("input.value") == "late"
            page.click("#read")
            page.wait(f"info.position === {size} + 5 && !busy && problem.hidden")

            served.end(signal.SIGKILL)
            served.start()
            page.call("Page.reload")
            page.wait(f"typeof info !== 'undefined' && info && info.position === {size} + 5 && !busy")
            assert page.evaluate("title.textContent") == "alice"
            page.click("[data-rewind]")
            page.wait(f"info.position === {size} && !busy")
            assert client.stream("alice").info()["learning"] is True

            page.type("#input", "<img src=x onerror=alert(1)> " * 60)
            page.click("#read")
            page.wait(f"info.position === {size} + 29 * 60 && !busy")
            assert page.evaluate("document.querySelectorAll('#text img').length") == 0
            _check_shapes(page, tmp_path)

            page.evaluate("location.hash = 'nobody'")
            page.wait("problem.textContent.includes('TITANS-E1207') && stream.hidden")
            page.evaluate("location.hash = 'twin'")
            page.wait("title.textContent === 'twin' && !busy")
            page.click("#delete")
            page.wait("dialog.open")
            page.click("#yes")
            page.wait("stream.hidden && !busy")
            assert [one["name"] for one in client.streams()] == ["alice"]
            assert page.requests and not [one for one in page.requests if not one.startswith((url, "data:", "blob:"))]
            assert page.problems == []
    finally:
        served.end(signal.SIGKILL)


@pytest.mark.long
@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")
def test_the_page_with_an_api_key(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, entry = new_key("a", ("complete", "read", "write"))
    keys = tmp_path / "keys.toml"
    keys.write_text(entry)
    monkeypatch.setenv("TITANS_SERVE_KEYS", str(keys))
    served = Served(bundle, tmp_path / "store", tmp_path / "log")
    served.start()
    try:
        with browser(tmp_path / "profile") as page:
            page.open(f"http://127.0.0.1:{served.port}/")
            page.wait("!key.hidden && problem.textContent.includes('TITANS-E1201')")
            for given in ("wrong", key):
                page.type("#secret", given)
                page.press("Enter")
                page.wait("!busy")
            page.wait("model.textContent === 'leaky-sum' && key.hidden && problem.hidden")
            page.call("Page.reload")
            page.wait("typeof busy !== 'undefined' && model.textContent === 'leaky-sum' && key.hidden")
    finally:
        served.end(signal.SIGKILL)


def _state(client: Client, name: str, folder: Path) -> dict[str, Any]:
    """All tensors of a stream."""
    path = folder / "state.tstate"
    path.write_bytes(client.stream(name).state())
    return rt.read_state(path).tensors


def _check_surprise(bundle: Path, tokens: list[Any]) -> None:
    """The bits of each character, from a session without a server."""
    assert "".join(text for text, _ in tokens) == TEXT
    with rt.Session(bundle, threads=1) as session, session.stream() as stream:
        bits = iter((-stream.score(TEXT.encode()) / math.log(2)).tolist())
    right = [sum(next(bits) for _ in character.encode()) for character in TEXT]
    assert [found for _, found in tokens] == pytest.approx(right, abs=0.006)


def _check_shapes(page: Page, folder: Path) -> None:
    """Nothing leaves a narrow window; text has contrast in both colours."""
    for width, dark in ((1100, False), (1100, True), (360, False), (360, True)):
        page.shape(width, 800, dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(stream).backgroundColor,"
            " getComputedStyle(document.querySelector('.faint')).color]"
        )
        ink, back, faint = (_luminance(colour) for colour in colours)
        assert (back < 0.05) == dark
        for one in (ink, faint):
            assert (max(one, back) + 0.05) / (min(one, back) + 0.05) >= 4.5, json.dumps(colours)
        page.screenshot(folder / f"{width}-{'dark' if dark else 'light'}.png")


def _luminance(colour: str) -> float:
    """Relative luminance of a CSS colour rgb(r, g, b), as WCAG defines it."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
