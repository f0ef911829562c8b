"""The ctypes structures of titans_runtime have the sizes and offsets of titans.h."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from titans_runtime import _library

HEADER = Path(__file__).parents[2] / "runtime" / "include" / "titans" / "titans.h"
STRUCTS = {
    "titans_session_options": _library.SessionOptions,
    "titans_feed": _library.Feed,
    "titans_state_options": _library.StateOptions,
    "titans_guard": _library.Guard,
    "titans_guard_report": _library.RawGuardReport,
    "titans_health": _library.RawHealth,
    "titans_durations": _library.RawDurations,
    "titans_metrics": _library.RawMetrics,
    "titans_memory_info": _library.MemoryInfo,
    "titans_sampling": _library.Sampling,
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes and offsets of the C structs: {"titans_guard": 24, "titans_guard.policy": 8, ...}."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("structs")
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "titans/titans.h"', "int main(void) {"]
    for name, struct in STRUCTS.items():
        lines.append(f'  printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(f'  printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    (folder / "layout.c").write_text("\n".join([*lines, "  return 0;", "}"]) + "\n")
    program = folder / "layout"
    include = f"-I{HEADER.parents[1]}"
    subprocess.run([*compiler.split(), include, "layout.c", "-o", str(program)], cwd=folder, check=True, timeout=60)
    printed = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(number) for name, number in (line.split() for line in printed.splitlines())}


def test_every_struct_of_the_header_is_compared() -> None:
    assert set(re.findall(r"^\} (titans_\w+);", HEADER.read_text(), re.MULTILINE)) - set(STRUCTS) <= {
        "titans_status",
        "titans_log_level",
        "titans_output",
        "titans_guard_policy",
        "titans_guard_reason",
        "titans_health_state",
    }


@pytest.mark.parametrize("name", STRUCTS)
def test_sizes_and_offsets(layout: dict[str, int], name: str) -> None:
    struct = STRUCTS[name]
    found = {name: ctypes.sizeof(struct)}
    found |= {f"{name}.{field}": getattr(struct, field).offset for field, *_ in struct._fields_}
    expected = {key: value for key, value in layout.items() if key.split(".")[0] == name}
    assert found == expected


@pytest.mark.parametrize("name", STRUCTS)
def test_all_fields_are_declared(name: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    match = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", text, re.DOTALL)
    assert match
    fields = re.findall(r"(\w+);", match[1])
    assert fields == [field for field, *_ in STRUCTS[name]._fields_]
