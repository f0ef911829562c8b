"""The archive of the C library: what a program needs to embed it, shared and static."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from shared_bundles import ROOT, mac_bytes

TUTORIAL = ROOT / "docs" / "tutorials" / "embed.md"
SOURCE = ROOT / "tests" / "cpp" / "installed" / "version.c"


def run(*args: object, **env: str) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_a_program_links_what_the_archive_holds(tmp_path: Path) -> None:
    runtime = pytest.importorskip("titans_runtime._library", reason="the runtime is not built", exc_type=ImportError)
    run(ROOT / "tools" / "dist", "-o", tmp_path / "dist", "native")
    [archive] = (tmp_path / "dist").glob("titans-*-linux-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    prefix = tmp_path / archive.name.removesuffix(".tar.gz")
    names = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    wanted = {
        "include/titans/titans.h",
        "include/titans/titans.hpp",
        "lib/libtitans.a",
        "lib/libtitans.so",
        "lib/libtitans_backend_onnxruntime.so",
        "lib/libtitans_onnxruntime_ops.so",
        "lib/cmake/titans/titansConfig.cmake",
        "lib/pkgconfig/titans.pc",
        "share/doc/titans/LICENSE",
        "share/doc/titans/NOTICES",
    }
    assert wanted <= names
    assert not [name for name in names if "test" in name]
    packages = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "titans", **packages).split()
    static = run("pkg-config", "--cflags", "--libs", "--static", "titans", **packages)
    run("cc", SOURCE, *flags, "-o", tmp_path / "shared")
    run("cc", SOURCE, *static.replace("-ltitans", "-l:libtitans.a").split(), "-o", tmp_path / "static")
    library = {"LD_LIBRARY_PATH": str(prefix / "lib")}
    assert run(tmp_path / "static") == run(tmp_path / "shared", **library)
    assert "libtitans" not in run("ldd", tmp_path / "static")

    code = re.search(r"```cpp\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    (tmp_path / "program.cpp").write_text(code[1])
    (tmp_path / "mac.titans").symlink_to(mac_bytes())
    run("c++", "-std=c++17", tmp_path / "program.cpp", *flags, "-o", tmp_path / "program")
    done = subprocess.run(
        [tmp_path / "program"], input=b"It was a dark and stormy night", capture_output=True, cwd=tmp_path,
        env={**os.environ, **library, "TITANS_ONNXRUNTIME": runtime.backend_library() or ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 64, "the default of generation"
    assert (tmp_path / "program.tstate").is_file()
