"""What is written aside: one writer never takes away what another one is writing, and what was abandoned goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from titans_export.errors import OutputError
from titans_export.files import check_file, check_output, replacing_file, replacing_folder


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


def refuse_folder(target: Path, message: str, **options: object) -> None:
    with pytest.raises(OutputError, match=message):
        check_output(target, True, "m", **options)  # type: ignore[arg-type]


def refuse_file(target: Path, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        check_file(target)


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    """Each refusal leaves the folder as it was, and what can be written is let through."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "m").touch()
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    for good in (tmp_path / "new", tmp_path / "bundle", tmp_path / "link", Path("new")):
        check_output(good, True, "m", needs=1)
    for good in (tmp_path / "new.json", tmp_path / "file", None):
        check_file(good)
    refuse_folder(tmp_path / "none" / "x", "cannot write .*x: No such file.*create the folder first")
    refuse_folder(tmp_path / "file" / "x", "cannot write .*x: Not a directory")
    refuse_folder(tmp_path / "file", "has no m and is not replaced")
    refuse_folder(tmp_path / "loop", "cannot resolve the path|has no m")
    refuse_folder(tmp_path / ("n" * 250), "cannot write .*: File name too long")
    refuse_folder(Path("/proc/x"), "cannot write /proc/x")
    refuse_folder(tmp_path / "x", r"too little space for .*x: expected at least 1,0\d+", needs=10**18)
    refuse_folder(tmp_path / "bundle", "the input .*/bundle/model lies inside", source=tmp_path / "bundle" / "model")
    refuse_folder(tmp_path / "bundle" / "x", "inside of the bundle that is read", source=tmp_path / "bundle")
    check_output(tmp_path / "bundle", True, "m", source=tmp_path / "bundle")
    refuse_file(tmp_path / "none" / "x.json", "no such folder: .*none. Fix: create the folder first")
    refuse_file(tmp_path / "bundle", "is a folder, not a file")
    refuse_file(Path("/dev/null"), "/dev/null is a device or a pipe, not a file")
    refuse_file(Path("/proc/x.json"), "cannot write /proc/x.json")
    refuse_file(tmp_path / ("n" * 250), "File name too long")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Root could: a rename over /dev/null would break the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="a device or a pipe"), replacing_file(pipe) as aside:
        aside.touch()
    assert pipe.is_fifo()


def test_file_systems_that_do_not_take_the_output(tmp_path: Path) -> None:
    """A read-only one, a mount point in the place of the output, and a small one, each mounted in its own namespace."""
    (tmp_path / "bundle").mkdir()
    script = (
        f'cd "{tmp_path}" && mkdir -p small ro && mount -t tmpfs -o size=64k none small '
        "&& mount -t tmpfs -o ro none ro && mount --bind bundle bundle && touch bundle/m"
    )
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", script]).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    code = (
        "from pathlib import Path\nfrom titans_export.files import *\nfrom titans_export.errors import OutputError\n"
        "for place in ('ro/x', 'bundle', 'small/x', 'small/y'):\n"
        "    try: check_output(Path(place), True, 'm', needs=100_000 * (place != 'small/y')); print(place, 'passes')\n"
        "    except OutputError as error: print(error)\n"
    )
    child = ["unshare", "-rm", "sh", "-c", f'{script} && exec "$@"', "sh", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    lines = subprocess.run(child, capture_output=True, text=True, env=environment).stdout.splitlines()
    for line, words in zip(
        lines,
        ("cannot write .*ro/x: Read-only file system", "mount point", "too little space for .*small/x", "y passes"),
        strict=True,
    ):
        assert re.search(words, line)
