"""The style guide of CONTRIBUTING.md as far as it can be checked: terms, length of sentences, paths."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CONCEPTS = ROOT / "docs" / "concepts.md"
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"))
    if path != CONCEPTS
)
# CONTRIBUTING.md shows phrases to avoid, CHANGELOG.md former names.
STYLED = [CONCEPTS, *(path for path in PAGES if path.name not in ("CONTRIBUTING.md", "CHANGELOG.md"))]
FOLDERS = ("titans_export", "calibration", "plugins", "runtime", "tests", "benchmarks", "examples", "tools", "docs")
MAX_WORDS = 20
MAX_FILES_ON_THE_READING_PATH = 12
# Each phrase to avoid, with the term to use.
AVOID = {
    r"expected .{1,60} but got": "problem: detail. Fix: what to do",
    r"likeliest": "top-1",
    r"contender|opponent": "baseline",
    r"\bfold(s|ed|ing)?\b(?! constant)": "chunk update",
    r"in fewer bits": "low-precision",
    r"graph of one token|single-token graph": "decode graph",
    r"gates? (of|for) (a|each|every) (token|chunk)|gates? an? (token|chunk)": "token gates, chunk gates",
    r"matrix products?\b": "matmul",
    r"\bin turns\b|takes? turns": "interleaved",
    r"kept errors|errors (are )?kept": "error feedback",
    r"takes its name": "is renamed into place atomically",
    r"what else there is|what there is|what is there|what ran": "a noun",
    r"\b[Ww]ho (is|has|gives|takes|opens|cannot|leaves)\b": "a noun",
    r"\b(page|file|test|manifest|log|table|command|program|tensors?) (says?|tells?|knows?|asks?)\b": (
        "a verb for what it does: contains, reports, reads"
    ),
    r"\bis none\b|\bare none\b|is no (failure|error|fault)": "a positive statement",
    r"\banew\b": "again",
    r"for people": "for users",
    r"(^|[.:] )Of (a|an|the|one|each|such) ": "the subject first",
}


def _prose(page: Path) -> str:
    """The text of a page without code, tables, headings and the targets of links."""
    text = re.sub(r"<!-- results: .*?<!-- end of results -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = (line for line in text.splitlines() if not line.startswith(("|", "    ", "#", "<!--", "![")))
    text = re.sub(r"`[^`\n]*`", "CODE", "\n".join(lines))
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def _tables(page: Path) -> str:
    lines = page.read_text(encoding="utf-8").splitlines()
    return re.sub(r"`[^`\n]*`", "CODE", "\n".join(line for line in lines if line.startswith("|")))


def _sentences(prose: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", prose)
    parts = itertools.chain.from_iterable(re.split(r"(?<=[.!?])\s+", " ".join(text.split())) for text in paragraphs)
    return [part for part in parts if len(part.split()) > 1]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _expand(name: str) -> list[str]:
    """The paths of a name with braces: `a.{h,cc}` is two."""
    if found := re.fullmatch(r"(.*)\{([^{}]*)\}(.*)", name):
        return [path for part in found[2].split(",") for path in _expand(f"{found[1]}{part}{found[3]}")]
    return [name]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_to_the_concepts(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert CONCEPTS in {(page.parent / target).resolve() for target in targets if ":" not in target}


@pytest.mark.parametrize("page", STYLED, ids=_name)
def test_uses_the_terms(page: Path) -> None:
    text = " ".join(_prose(page).split()) + "\n" + _tables(page)
    found = [f"{match[0]!r}: use {term}" for avoid, term in AVOID.items() for match in re.finditer(avoid, text)]
    assert not found


@pytest.mark.parametrize("page", STYLED, ids=_name)
def test_sentences_are_short(page: Path) -> None:
    lengths = [len(sentence.split()) for sentence in _sentences(_prose(page))]
    assert lengths
    assert sum(lengths) / len(lengths) <= MAX_WORDS


@pytest.mark.parametrize("page", [*PAGES, CONCEPTS], ids=_name)
def test_paths_exist(page: Path) -> None:
    """Paths in code, unless they have a placeholder such as NAME, or are made by a build."""
    names = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./{{}},-]+)`", page.read_text(encoding="utf-8"))
    missing = [
        path
        for name in names
        if not re.search(r"[A-Z]{4,}", name)
        for path in _expand(name)
        if not (ROOT / path).exists()
    ]
    assert not missing


def test_the_reading_path_is_short() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Reading path")[2].partition("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `([^`]+)`", section, re.MULTILINE)
    assert files[0] == "titans_export/cli/run.py"
    assert files[-1].startswith("plugins/kernels/")
    assert len(files) <= MAX_FILES_ON_THE_READING_PATH
    assert len(set(files)) == len(files)


def test_the_terms_to_avoid_are_found() -> None:
    """The patterns match the phrases that the style guide gives as examples."""
    examples = (
        "expected memory but got none", "same likeliest", "a contender of yours", "a token folds",
        "memories in fewer bits", "the graph of one token", "one gate for each chunk", "a matrix product",
        "measured in turns", "takes its name",
        "Who is wrong is reported", "the manifest says", "a size that there cannot be is no failure", "made anew",
    )  # fmt: skip
    assert [text for text in examples if not any(re.search(avoid, text) for avoid in AVOID)] == []
