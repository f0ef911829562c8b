"""The examples, as a user would run them; those in C and C++ built against the installed CMake package."""

from __future__ import annotations

import array
import contextlib
import fcntl
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import shared_bundles
from cli_tools import environment

rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

pytest_plugins = ["cli_fixtures"]
ROOT = Path(__file__).parents[2]


def _run(*command: object, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the runtime without the CPU kernel, which is slow to compile and which ctest installs.

    Its build folder is kept, so that a second run compiles nothing.
    """
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed: make setup")
    build, target = ROOT / "build" / "install-test", tmp_path_factory.mktemp("prefix")
    _run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTITANS_HIGHWAY_INCLUDE=OFF")
    _run("cmake", "--build", build, "-j2")
    _run("cmake", "--install", build, "--prefix", target)
    return target


@pytest.fixture(scope="module")
def programs(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the programs that the examples of a language make."""
    folders = {}
    for language in ("c", "cpp"):
        folders[language] = tmp_path_factory.mktemp(language)
        _run("cmake", "-S", ROOT / "examples" / language, "-B", folders[language], f"-DCMAKE_PREFIX_PATH={prefix}")
        _run("cmake", "--build", folders[language])
    return folders


def _with_backend() -> dict[str, str]:
    return {"TITANS_ONNXRUNTIME": os.environ.get("TITANS_ONNXRUNTIME") or str(rt._library.backend_library())}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_an_example_prints_what_python_computes(
    language: str, programs: dict[str, Path], shared_bundle: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(_some_text(5000))
    printed = _run(programs[language] / "stream_text", shared_bundle, text, **_with_backend())
    assert math.isclose(_bits_per_byte(printed), _expected_bits(shared_bundle, text.read_bytes()), abs_tol=2e-6)


def _some_text(count: int) -> bytes:
    return bytes(np.random.default_rng(0).integers(32, 127, count).astype(np.uint8))


def _bits_per_byte(printed: str) -> float:
    found = re.search(r"^bits_per_byte: ([0-9.]+)$", printed, re.MULTILINE)
    assert found, printed
    return float(found[1])


def _expected_bits(bundle: Path, text: bytes, before: bytes = b"") -> float:
    with rt.Session(bundle) as session:
        stream = session.stream()
        stream.feed(before, outputs="none")
        return -float(stream.score(text).astype(np.float64).sum()) / len(text) / math.log(2)


def _wait_until_read(pipe: IO[bytes]) -> None:
    """Until nothing is left in the pipe."""
    left = array.array("i", [1])
    while left[0]:
        time.sleep(0.01)
        fcntl.ioctl(pipe, termios.FIONREAD, left)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_program_for_a_device_goes_on_where_it_was(
    programs: dict[str, Path], shared_bundle: Path, tmp_path: Path
) -> None:
    """Ended by SIGTERM in the middle of its input, then by the input's end: as one stream that nobody ended."""
    state, text = tmp_path / "device.tstate", _some_text(3000)
    command = [str(programs["c"] / "remember"), str(shared_bundle), str(state)]
    env = {**os.environ, **_with_backend()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdin and first.stdout and first.stderr
        assert first.stderr.readline() == b"remember: from position 0\n"
        first.stdin.write(text[:1200])
        first.stdin.flush()
        _wait_until_read(first.stdin)  # it learns then, or waits for more; both have to end well
        first.send_signal(signal.SIGTERM)
        printed = first.stdout.read().decode()
        assert first.wait(timeout=60) == 0, first.stderr.read()
    assert "position: 1200\n" in printed
    assert rt.read_state(state).position == 1200

    second = subprocess.run(command, env=env, input=text[1200:], capture_output=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert second.stderr == b"remember: from position 1200\n"
    printed = second.stdout.decode()
    expected = _expected_bits(shared_bundle, text[1200:], before=text[:1200])
    assert math.isclose(_bits_per_byte(printed), expected, abs_tol=2e-6)
    tokens = re.search(r"^titans_tokens_total\{[^}]*\} ([0-9]+)$", printed, re.MULTILINE)
    assert tokens and tokens[1] == "1800", printed

    state.write_bytes(b"damaged")
    third = subprocess.run(command, env=env, input=b"", capture_output=True, timeout=60)
    assert third.returncode == 1
    assert re.fullmatch(rb"remember: \[[^\]]+\] .+\. Fix: .+ \(TITANS-E\d{4}\)\n", third.stderr)
    assert state.read_bytes() == b"damaged"


def _chat(bundle: Path, state: Path, *lines: str) -> str:
    """What a chat prints, in a process of its own."""
    script = ROOT / "examples" / "chat.py"
    done = subprocess.run(
        [sys.executable, script, bundle, "--state", state],
        input="\n".join(lines), capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_remembers(shared_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "ann.tstate"
    first = _chat(shared_bundle, state, "My name is Ann.", "/memory", "/what", "/save")
    assert "a fresh memory" in first
    assert re.search(r"\d+ tokens read, \d+ bytes of state\n  \|layers\.0\.memory\.W0\| = ", first)
    assert "commands: /save" in first
    assert f"saved in {state}" in first
    position = rt.read_state(state).position
    assert position > len("My name is Ann.\n")

    second = _chat(shared_bundle, state, "/rewind", "What is my name?", "/rewind", "/quit", "never said")
    assert f"position {position}\n" in second
    assert "nothing to take back" in second
    assert f"back at position {position}" in second
    assert rt.read_state(state).position == position

    third = _chat(shared_bundle, state, "/back", "/fork", "Something else.", "/back", "/quit")
    assert "there is no fork" in third
    assert "fork> " in third
    assert f"back at position {position}, before the fork" in third
    assert rt.read_state(state).position == position

    fourth = _chat(shared_bundle, state, "/forget", "/quit")
    assert "forgotten" in fourth
    assert not state.exists()


def test_what_was_taken_back_was_never_said(shared_bundle: Path, tmp_path: Path) -> None:
    states = [tmp_path / "a.tstate", tmp_path / "b.tstate"]
    _chat(shared_bundle, states[0], "One.", "Two.", "/rewind", "Three.")
    _chat(shared_bundle, states[1], "One.", "Three.")
    one, other = (rt.read_state(state) for state in states)
    assert one.position == other.position
    assert all(np.array_equal(one.memory()[name], values) for name, values in other.memory().items())


@pytest.fixture(scope="module")
def language_model() -> Path:
    """mac-bytes, which has read a novel; what is odd to a random model tells nothing."""
    return shared_bundles.mac_bytes()


ODD = "disk sdb: I/O error, sector 0x7f3a9c, aborting journal"


def _log(count: int, odd: int) -> list[bytes]:
    """A log of what workers do, in words; the line number `odd` is another program's."""
    random = np.random.default_rng(0)
    words = [("one", "two", "three", "four"), ("finished", "begun", "taken"), ("morning", "evening", "night")]
    lines = []
    for index in range(1, count + 1):
        worker, verb, time_of_day = (str(random.choice(choice)) for choice in words)
        routine = f"worker {worker} has {verb} the {time_of_day} job and went on to the next"
        lines.append(f"{ODD if index == odd else routine}\n".encode())
    return lines


@contextlib.contextmanager
def _stdin(content: bytes) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(content))
    try:
        yield
    finally:
        sys.stdin = before


def _watch(*arguments: object) -> int:
    from watch_log import main

    before = signal.getsignal(signal.SIGTERM)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_watcher_finds_the_odd_line_and_no_other(
    language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two runs: the second has the odd line before it has seen as many lines as it needs to judge one."""
    state, lines = tmp_path / "log.tstate", _log(56, odd=40)
    options = (language_model, "--state", state, "--warm-up", 25)
    with _stdin(b"".join(lines[:30])):
        assert _watch(*options) == 0
    assert capsys.readouterr().out == ""
    with _stdin(b"".join(lines[30:])):
        assert _watch(*options) == 0
    (found,) = capsys.readouterr().out.splitlines()
    assert found.startswith("line 40  z ")
    assert found.endswith(ODD)
    assert rt.read_state(state).position == sum(map(len, lines))


def test_the_watcher_follows_a_file_and_its_successor(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and started again, with a line half written and the file replaced: each line is read once."""
    log, state, later = tmp_path / "app.log", tmp_path / "app.tstate", list[Callable[[], object]]()

    def wait(seconds: float) -> None:
        """What happens to the file while the watcher waits; then Ctrl-C."""
        if not later:
            raise KeyboardInterrupt
        later.pop(0)()

    def run() -> int:
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", wait)
            assert _watch(shared_bundle, "--follow", log, "--state", state) == 0
        return int(rt.read_state(state).position)

    log.write_bytes(b"first line\nsecond line\nhalf")
    assert run() == len(b"first line\nsecond line\n")
    log.write_bytes(log.read_bytes() + b" a line\n")
    assert run() == len(b"first line\nsecond line\nhalf a line\n")
    later += [
        lambda: log.rename(tmp_path / "app.log.1"),
        lambda: log.write_bytes(b"a new file\n"),
    ]
    assert run() == len(b"first line\nsecond line\nhalf a line\na new file\n")
    log.write_bytes(b"cut\n")
    assert run() == len(b"first line\nsecond line\nhalf a line\na new file\ncut\n")
    (tmp_path / "app.tstate.json").unlink()  # as where it was killed before it wrote that
    assert run() == len(b"first line\nsecond line\nhalf a line\na new file\ncut\ncut\n")
