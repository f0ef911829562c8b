"""What is written aside: one writer never takes away what another one is writing, and what was abandoned goes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from titans_export.files import replacing_file, replacing_folder


def test_an_abandoned_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.json.abcdefgh.tmp").write_text("half")
    (tmp_path / ".x.json.mine").write_text("another's")
    (tmp_path / ".y.json.abcdefgh.tmp").write_text("of another target")
    with replacing_file(tmp_path / "x.json") as aside:
        aside.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".x.json.mine", ".y.json.abcdefgh.tmp", "x.json"]
    assert (tmp_path / "x.json").read_text() == "whole"


def test_an_abandoned_folder_is_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / ".x[1].titans.abcdefgh.tmp"  # a name that is a pattern too
    abandoned.mkdir()
    (abandoned / "half").touch()
    with replacing_folder(tmp_path / "x[1].titans", overwrite=False, marker="m") as aside:
        (aside / "m").touch()
    assert os.listdir(tmp_path) == ["x[1].titans"]


@pytest.mark.parametrize("folders", [False, True])
def test_writers_at_the_same_time(tmp_path: Path, folders: bool) -> None:
    """Of one target: each keeps its own, and the last one to end is there."""
    target = tmp_path / "x"

    def writing() -> AbstractContextManager[Path]:
        return replacing_folder(target, overwrite=True, marker="m") if folders else replacing_file(target)

    def fill(aside: Path, content: str) -> None:
        (aside / "m" if folders else aside).write_text(content)

    with writing() as one:
        fill(one, "one")
        with writing() as other:
            fill(other, "other")
        assert one.exists()
    assert (target / "m" if folders else target).read_text() == "one"
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / ".x.abcdefgh.tmp").symlink_to(kept)
    with replacing_file(tmp_path / "x") as aside:
        aside.touch()
    assert kept.read_text() == "mine"
