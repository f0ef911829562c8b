"""Names of files and folders of any kind, other file systems, links and pipes, for every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tools import TEXT, Result, command, environment, invoke, spawn

from titans_export.files import utf8_path

pytest_plugins = ["cli_fixtures"]
NAME = "-a b'c\"d\n$HOME;`e`&*?[f]%s{}\\日本" + os.fsdecode(b"\xff\xfe")
LONG = "l" * 200


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose name is hard, as the working directory."""
    folder = tmp_path / NAME
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


def succeed(*args: object) -> Result:
    result = invoke(*args)
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("name", [NAME, LONG], ids=["hard", "long"])
def test_commands_take_any_name(name: str, place: Path, shared_bundle: Path) -> None:
    pytest.importorskip("titans_calibration")
    bundle, text = f"{name}.titans", f"{name}.txt"
    shutil.copytree(shared_bundle, bundle)
    Path(text).write_bytes(TEXT * 3)
    assert json.loads(succeed("inspect", "--json", "--", bundle).out)["bundle"] == bundle
    succeed("verify", "--tokens", 40, "--", bundle)
    read = succeed("run", "--text", text, "--prompt", "a", "--max-tokens", 3, "--json", "--", bundle).json()
    assert (read["text"], read["bytes"]) == (text, 3 * len(TEXT))
    quantised = f"{name}8.titans"
    options = ("--data", text, "--tokens", 1100, "--memory", "float16")
    succeed("quantize", "-o", quantised, "--recipe", "int8-weight-only", *options, "--", bundle)
    succeed("build", "--target", "cpu", "--", bundle)
    assert succeed("run", "--prompt", "a", "--max-tokens", 1, "--json", "--", bundle).json()["engine"]
    succeed("verify", "--tokens", 40, "--", quantised)
    assert {path.name for path in place.iterdir()} == {bundle, text, quantised}


@pytest.mark.long
def test_measurements_take_any_name(place: Path, shared_bundle: Path) -> None:
    bundle, text = f"{NAME}.titans", f"{NAME}.txt"
    shutil.copytree(shared_bundle, bundle)
    shutil.copytree(shared_bundle, f"_{bundle}")
    Path(text).write_bytes(TEXT)
    outputs = ("-o", f"{NAME}.json", "--html", f"{NAME}.html")
    options = ("--text", text, "--tokens", 300, "--layers", 64, "--recall", 0)
    succeed("compare", *options, *outputs, "--", bundle, f"_{bundle}")
    assert Path(f"{NAME}.html").read_text(encoding="utf-8").count("$HOME")
    sizes = ("--tokens", 16, "--decode-tokens", 4, "--rounds", 1, "--threads", 1)
    succeed("bench", *sizes, "--output", f"{NAME}.bench", "--", bundle)


def test_checkpoints_have_any_name(place: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, f"{NAME}.d")
    succeed("export", "-o", f"{NAME}.titans", "--chunks-per-call", 1, "--positions", 8, "--", f"{NAME}.d")
    succeed("verify", "--against", f"{NAME}.d", "--tokens", 20, "--", f"{NAME}.titans")


def test_names_are_shown_whatever_the_encoding_of_stdout(place: Path, shared_bundle: Path) -> None:
    name = os.fsdecode("日本".encode() + b"\xff.titans")
    shutil.copytree(shared_bundle, name)
    for encoding, shown in (("utf-8", os.fsencode(name)), ("latin-1", b"\\u65e5\\u672c\\udcff.titans")):
        child = command("inspect", name)
        done = subprocess.run(child, capture_output=True, env=environment(PYTHONIOENCODING=encoding), timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(shown)
    spawned = subprocess.run(command("inspect", name + "x"), capture_output=True, env=environment(), timeout=120)
    assert spawned.returncode == 1 and spawned.stderr.startswith(b"titans-export: [bundle]")


def test_emitted_scripts_run_from_any_folder(place: Path, shared_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_bundle, "b.titans")
    plugin = "lib 'x' $y.so"
    succeed("build", "--target", "orin-agx", "--emit-trtexec", "-o", "-out", "--plugin-library", plugin, "b.titans")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\n" "$one"; done; ls -1\n')
    (tools / "trtexec").chmod(0o755)
    (tmp_path / "-out").mkdir()  # where CDPATH would lead
    env = environment(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", CDPATH=str(tmp_path))
    for cwd, script in (
        (place, "-out/build.sh"),
        (tmp_path, str(place / "-out" / "build.sh")),
        (place / "-out", "build.sh"),
    ):
        shell = ["sh", "--", script] if cwd == place else ["sh", script]
        done = subprocess.run(shell, cwd=cwd, env=env, capture_output=True, timeout=60, check=True)
        lines = done.stdout.decode().splitlines()
        assert f"--dynamicPlugins={plugin}" in lines
        assert "build.sh" in lines


def test_bundles_behind_links_and_on_other_file_systems(shared_bundle: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK):
        pytest.skip("no second file system")
    far = other / f"titans-test-{os.getpid()}.titans"
    try:
        shutil.copytree(shared_bundle, far)
        (tmp_path / "link.titans").symlink_to(far)
        succeed("run", tmp_path / "link.titans", "--prompt", "a", "--max-tokens", 1)
        succeed("verify", tmp_path / "link.titans", "--tokens", 20)
        succeed("quantize", tmp_path / "link.titans", "-o", tmp_path / "q.titans", "--recipe", "int8-weight-only")
        succeed("build", tmp_path / "q.titans", "--target", "cpu", "-o", far, "--overwrite")
        assert (tmp_path / "link.titans").is_symlink() and succeed("inspect", far, "--json").json()["engines"]
    finally:
        shutil.rmtree(far, ignore_errors=True)


@pytest.mark.long
def test_a_read_only_bundle_is_read_and_not_written(shared_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(shared_bundle, tmp_path / "ro" / "x.titans"))
    mount = f'mount --bind "{tmp_path}/ro" "{tmp_path}/ro" && mount -o remount,ro,bind "{tmp_path}/ro"'
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody mount a folder")

    def run(*args: object) -> Result:
        child = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command(*args)]
        done = subprocess.run(child, capture_output=True, env=environment(), timeout=120)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    assert run("run", bundle, "--prompt", "a", "--max-tokens", 1).code == 0
    assert run("verify", bundle, "--tokens", 20).code == 0
    run("build", bundle, "--target", "cpu").check_failure(1, "Read-only file system")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_texts_that_are_no_files(kind: str, shared_bundle: Path, tmp_path: Path) -> None:
    run = ("run", shared_bundle, "--json", "--text")
    if kind == "folder":
        invoke(*run, tmp_path).check_failure(1, str(tmp_path), "give a file")
        return
    if kind == "device":
        assert spawn(*run, "/dev/stdin", stdin=TEXT).json()["tokens"] == len(TEXT)
        return
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", f'cat > "{tmp_path}/pipe"'], stdin=subprocess.PIPE) as writer:
        assert writer.stdin
        writer.stdin.write(TEXT)
        writer.stdin.close()
        assert spawn(*run, tmp_path / "pipe").json()["tokens"] == len(TEXT)


def test_stdin_may_be_closed(shared_bundle: Path) -> None:
    child = ["sh", "-c", 'exec "$@" <&-', "sh", *command("run", shared_bundle, "--text", "-")]
    done = subprocess.run(child, capture_output=True, env=environment(), timeout=120)
    Result(done.returncode, "", done.stderr.decode()).check_failure(2, "stdin is closed")


def test_other_libraries_get_names_in_utf8(tmp_path: Path) -> None:
    for place in (tmp_path / NAME, tmp_path / "plain"):
        place.mkdir()
        for path in (place / "x", place / NAME):
            path.write_text("content")
            with utf8_path(path) as name:
                assert name.encode() and Path(name).read_text() == "content"
        with utf8_path(place) as name:
            assert name.encode() and Path(name, "x").read_text() == "content"
    with utf8_path(tmp_path / "plain" / "none") as name:
        assert name == str(tmp_path / "plain" / "none")
