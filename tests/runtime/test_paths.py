"""Names of any bytes, links, other working directories and other file systems, for the runtime's calls."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from shared_bundles import synthetic

rt = pytest.importorskip("titans_runtime", exc_type=ImportError, reason="the runtime is not built")

NAMES = ("with space", "-'\"\\$HOME;`e`%s{}", "new\nline", "日本", os.fsdecode(b"x\xff\xfe"), "l" * 200)
TOKENS = np.arange(40) % 16


@pytest.mark.parametrize("name", NAMES, ids=("space", "signs", "newline", "script", "bytes", "long"))
def test_every_call_after_the_working_directory_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / name, tmp_path / "elsewhere"
    there.mkdir()
    here.mkdir()
    plain = rt.Session(synthetic()).stream()
    first, second = plain.feed(TOKENS), plain.feed(TOKENS)
    shutil.copytree(synthetic(), here / f"{name}.titans")
    (here / name).mkdir()
    monkeypatch.chdir(here)
    with rt.Session(f"{name}.titans", spill_dir=name, memory_budget=plain.state_bytes * 3 // 2) as session:
        monkeypatch.chdir(there)
        streams = [session.stream() for _ in range(4)]  # most are spilled
        assert all(np.array_equal(stream.feed(TOKENS), first) for stream in streams)
        assert session.metrics().spilled
        assert os.listdir(here / name) and not os.listdir(there)
        monkeypatch.chdir(here)
        streams[0].save(f"{name}.tstate")
        monkeypatch.chdir(there)
        restored = session.restore(here / f"{name}.tstate")
        assert np.array_equal(restored.feed(TOKENS), second)
        assert all(np.array_equal(stream.feed(TOKENS), second) for stream in streams)
        text = session.metrics_text()
        assert "new\nline" not in text and text.count('bundle="')
        json.dumps(session.info)
        for wrong in (
            lambda: rt.Session(here / f"{name}x"),
            lambda: session.restore(here / f"{name}x"),
            lambda: restored.save(here / f"{name}x" / "y"),
            lambda: rt.Session(f"{name}.titans"),  # it is relative to the other folder
        ):
            with pytest.raises(rt.Error, match=r"^\[.*TITANS-E\d{4}\)$"):
                wrong()
        for stream in (*streams, restored):
            stream.close()
    assert os.listdir(here / name) == []


def test_bundles_that_are_linked_moved_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rt.Session(synthetic()).stream().feed(TOKENS)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(synthetic(), "real.titans")
    Path("link.titans").symlink_to("real.titans")
    Path("loop.titans").symlink_to("loop.titans")
    session = rt.Session("link.titans")
    Path("real.titans").rename("moved.titans")
    assert np.array_equal(session.stream().feed(TOKENS), right)
    shutil.rmtree("moved.titans")
    assert np.array_equal(session.stream().feed(TOKENS), right)
    for wrong in ("link.titans", "loop.titans", "x" * 300, "x/" * 3000):
        with pytest.raises(rt.Error, match="not a bundle"):
            rt.Session(wrong)


def test_states_on_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK):
        pytest.skip("no second file system")
    far = other / f"titans-test-{os.getpid()}"
    far.mkdir()
    try:
        session = rt.Session(synthetic(), spill_dir=far)
        stream = session.stream()
        stream.feed(TOKENS)
        for place in (far, tmp_path):
            stream.save(place / "a.tstate")
            assert session.restore(place / "a.tstate").position == len(TOKENS)
        del stream, session
    finally:
        shutil.rmtree(far)
