"""Progress on stderr: plain lines with the time left when it is no terminal."""

from __future__ import annotations

import pytest

from titans_export.cli import progress


class Clock:
    """A clock that tests set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_say_how_much_is_done_and_how_long_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("tracing", 8_000, "tokens") as advance:
        clock.now += 5
        advance(1_000)
        clock.now += 5
        advance(1_000)  # a quarter in 10 s
        advance(1_000)
        clock.now += 110
        advance(1_000)
        clock.now += 20
        advance(4_000)  # the end
    assert capsys.readouterr().err.splitlines() == [
        "titans-export: tracing: 2,000 of 8,000 tokens (25%), 30 s left",
        "titans-export: tracing: 4,000 of 8,000 tokens (50%), 2 min 0 s left",
    ]


def test_a_step_without_a_total_has_no_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("reading", None, "B") as advance:
        clock.now += 4000
        advance(7)
    assert capsys.readouterr().err == "titans-export: reading: 7 B, 1 h 6 min so far\n"


def test_a_short_step_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("tracing", 3, "graphs") as advance:
        clock.now += 9
        advance(1)
        advance(2)
    assert capsys.readouterr().err == ""
