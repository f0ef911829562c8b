"""What the library's binary interface may and may not change (tools/abi), and what the library exports."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "runtime" / "include" / "titans" / "titans.h"

needs_libabigail = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("abidw", "abidiff", "gcc")),
    reason="no abidw, abidiff and gcc: apt install abigail-tools",
)


def check(header: Path = HEADER) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ROOT / "tools" / "abi"), "check", str(header)], capture_output=True, text=True)


@needs_libabigail
def test_the_header_has_the_described_interface() -> None:
    done = check()
    assert done.returncode == 0, done.stderr


VERSION = "TITANS_API const char* titans_version(void);"
STRUCT = "typedef struct titans_new { size_t struct_size; float x; } titans_new; TITANS_API int titans_f(titans_new*);"


@needs_libabigail
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VERSION, VERSION + "TITANS_API int titans_new(int);"),
        (VERSION, STRUCT + VERSION),
        ("} titans_session_options;", "const char* newer; int32_t newest; } titans_session_options;"),
        ("} titans_metrics;", "uint64_t newer; } titans_metrics;"),
        ("TITANS_UNSUPPORTED = 4,", "TITANS_UNSUPPORTED = 4, TITANS_NEWER = 77,"),
    ],
    ids=["function", "struct and function", "option", "metric", "status"],
)
def test_additions_pass(old: str, new: str, tmp_path: Path) -> None:
    header = changed(old, new, tmp_path)
    done = check(header)
    assert done.returncode == 0, done.stderr


@needs_libabigail
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (VERSION, "", "titans_version"),
        ("titans_session_open(const char* path,", "titans_session_open(int flags, const char* path,", "parameter 1"),
        ("int32_t threads;", "int64_t threads;", "int64_t"),
        ("int32_t threads;", "float threads;", "float"),
        ("const char* plugin_dir;", "", "plugin_dir"),
        ("const char* plugin_dir;", "const char* newer; const char* plugin_dir;", "newer"),
        # Part of a struct that grows, so it must not grow itself.
        ("} titans_durations;", "double newer; } titans_durations;", "newer"),
        ("} titans_guard;", "int32_t newer; } titans_guard;", "padding"),
        ("TITANS_UNSUPPORTED = 4,", "TITANS_UNSUPPORTED = 6,", "TITANS_UNSUPPORTED"),
        ("void (*titans_log_function)(void* user,", "void (*titans_log_function)(int f, void* user,", "log_function"),
    ],
    ids=["function", "parameter", "width", "type", "removed", "inserted", "nested", "padding", "status", "callback"],
)  # fmt: skip
def test_changes_fail(old: str, new: str, told: str, tmp_path: Path) -> None:
    done = check(changed(old, new, tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert told in done.stderr
    assert re.search(r"^\[abi\] .+\. Fix: .+ \(TITANS-E1106\)$", done.stderr, re.MULTILINE)


def test_the_library_exports_the_functions_of_the_header_alone() -> None:
    library = pytest.importorskip("titans_runtime._library", reason="the runtime is not built: make setup")
    path = library._library_path()
    listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    exported = dict(line.split()[1:][::-1] for line in listed.splitlines())
    functions = re.findall(r"^TITANS_API[^;(]*?(titans_\w+)\(", HEADER.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(functions) > 30
    assert {name for name, kind in exported.items() if kind != "A"} == {f"{name}@@TITANS_0" for name in functions}
    assert [name for name, kind in exported.items() if kind == "A"] == ["TITANS_0"]


def changed(old: str, new: str, folder: Path) -> Path:
    """A copy of the header with one thing changed."""
    text = HEADER.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"titans.h has {old} {text.count(old)} times"
    header = folder / "titans.h"
    header.write_text(text.replace(old, new), encoding="utf-8")
    return header
