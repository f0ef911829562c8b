"""The form of errors, and the list of their codes in docs/errors.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from titans_export.errors import BundleError, MissingBundleError, MissingCheckpointError, TitansError, UsageError
from titans_export.files import replacing_file, replacing_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
# A code as a literal of its own, in the text of an error, or as an argument of `fail` in a script.
CODE = re.compile(r'(?:"|TITANS-|\bfail )(E\d{4})\b')
SOURCES = {
    "python": [
        path
        for folder in ("titans_export", "calibration", "runtime/python", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "build" not in path.parts
    ],
    "scripts": [path for path in (ROOT / "tools").iterdir() if path.is_file()],
    "c++": [
        path
        for folder in ("runtime/src", "runtime/include", "plugins")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
    ],
}


def _rows() -> list[tuple[str, list[str]]]:
    """Section, such as E02, and cells of each row of the list."""
    rows, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (E\d\d): ", line):
            section = heading[1]
        elif line.startswith("| TITANS-"):
            rows.append((section, [cell.strip() for cell in line.strip("|").split("|")]))
    return rows


def _used(language: str) -> dict[str, str]:
    """Each code in the sources, with a file that has it."""
    return {
        code: str(path.relative_to(ROOT))
        for path in SOURCES[language]
        for code in CODE.findall(path.read_text(encoding="utf-8"))
    }


def test_every_row_has_a_problem_a_cause_and_a_fix() -> None:
    rows = _rows()
    assert len(rows) > 10
    for section, cells in rows:
        assert len(cells) == 4 and all(cells), cells
        assert re.fullmatch(r"TITANS-E\d{4}", cells[0]), cells
        assert cells[0].startswith(f"TITANS-{section}"), f"{cells[0]} is in section {section}"
        assert not any(cell.endswith(".") for cell in cells), cells


def test_no_code_is_listed_twice() -> None:
    assert not [code for code, count in Counter(cells[0] for _, cells in _rows()).items() if count > 1]


@pytest.mark.parametrize("language", SOURCES)
def test_every_code_is_listed(language: str) -> None:
    listed = {cells[0].removeprefix("TITANS-") for _, cells in _rows()}
    assert not {code: path for code, path in _used(language).items() if code not in listed}


def test_every_listed_code_is_used() -> None:
    used = {code for language in SOURCES for code in _used(language)}
    assert not {cells[0] for _, cells in _rows()} - {f"TITANS-{code}" for code in used}


def test_an_error_is_one_line_with_a_code() -> None:
    error = BundleError("E0204", "bundle", "damaged file:\n x.onnx", "export the bundle again")
    assert str(error) == "[bundle] damaged file: x.onnx. Fix: export the bundle again (TITANS-E0204)"
    assert (error.code, error.where, error.exit_code) == ("TITANS-E0204", "bundle", 1)


def test_errors_are_of_the_built_in_kinds() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(BundleError, ValueError)
    for missing in (MissingBundleError, MissingCheckpointError):
        with pytest.raises(FileNotFoundError, match=r"\[a\] b\. Fix: c \(TITANS-E0201\)"):
            raise missing("E0201", "a", "b", "c")


def test_output_does_not_hide_a_missing_input(tmp_path: Path) -> None:
    """The error is a FileNotFoundError, but not one of the output."""

    def fail() -> None:
        raise MissingBundleError("E0201", "bundle", "no bundle", "give one")

    with pytest.raises(TitansError, match="no bundle"), replacing_file(tmp_path / "a"):
        fail()
    with pytest.raises(TitansError, match="no bundle"), replacing_folder(tmp_path / "b", False, "marker"):
        fail()
    assert not list(tmp_path.iterdir())
