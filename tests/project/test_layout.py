"""What the repository promises about itself: commands, links, versions, layering."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import titans_export

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for folder, pattern in ((".", "*.md"), ("docs", "**/*.md"), ("examples", "**/*.md"), ("runtime", "**/*.md"))
    for path in (ROOT / folder).glob(pattern)
    if "build" not in path.relative_to(ROOT).parts
)
TEXTS = {".md", ".py", ".toml", ".txt", ".yaml", ".json", ".cmake", ".in", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ""}
BACKENDS = Path("runtime", "src", "backends")
CHECKPOINT_BYTES = 8 * 1024 * 1024
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# The rooms of runtime/src, and the rooms that each may include beside itself. Rooms further down include rooms further
# up, so that there is no circle; a backend includes no other backend.
ROOMS: dict[str, set[str]] = {
    "base": set(),
    "bundle": {"base"},
    "backends": {"base", "bundle"},  # backend.h, which the core and the backends share, and its loader
    "cuda": {"base", "bundle", "backends"},
    "state": {"base", "bundle", "backends"},
    "session": {"base", "bundle", "backends", "cuda", "state"},
    "stream": {"base", "bundle", "backends", "state", "session"},
    "api": {"base", "bundle", "state", "session", "stream"},
    "backends/onnxruntime": {"base", "bundle", "backends", "cuda"},
    "backends/tensorrt": {"base", "bundle", "backends", "cuda"},
}
# The headers of each framework, by the one folder of runtime/src/backends that may include them.
FRAMEWORKS = {
    "onnxruntime": re.compile(r"onnxruntime"),
    "tensorrt": re.compile(r"Nv[A-Z]\w+\.h"),
    "": re.compile(r"torch|ATen"),
}


def _tracked() -> Iterator[Path]:
    """Files that are or would be in git; in an unpacked archive, all but what is built."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        built = {".venv", ".deps", "build", ".git", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not built & set(path.relative_to(ROOT).parts)]
    yield from (path for path in paths if path.is_file())


def _code(text: str) -> str:
    """Everything in a Markdown text that is set as code."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def _slug(heading: str) -> str:
    """A heading's anchor."""
    words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return words.replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists():
            broken.append(target)
        elif anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in map(_slug, headings):
                broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_documents_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", _code((ROOT / document).read_text(encoding="utf-8"))))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_exist(document: Path) -> None:
    from titans_export.cli import main

    named = set(re.findall(r"titans-export ([a-z]+)\b", _code(document.read_text(encoding="utf-8"))))
    assert named <= set(main.commands)


def test_versions_agree() -> None:
    def find(name: str, pattern: str) -> str:
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert match, f"no version in {name}"
        return match[1]

    versions = {
        "pyproject.toml": find("pyproject.toml", r'^version = "(.+)"'),
        "dependency of pyproject.toml": find("pyproject.toml", r'"titans-runtime==(.+)"'),
        "runtime/python/pyproject.toml": find("runtime/python/pyproject.toml", r'^version = "(.+)"'),
        "CMakeLists.txt": find("CMakeLists.txt", r"^project\(titans VERSION ([0-9.]+)"),
        "CHANGELOG.md": find("CHANGELOG.md", r"^## \[(.+?)\]"),
        "titans_export": titans_export.__version__,
    }
    assert len(set(versions.values())) == 1, versions


def test_the_library_knows_its_version() -> None:
    runtime = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    assert runtime.__version__ == titans_export.__version__


def test_no_file_names_a_place_on_this_machine() -> None:
    home = re.escape(str(Path.home())) + r"/\w" if Path.home() != Path("/") else r"(?!)"
    here = re.escape(str(ROOT))
    local = re.compile(rf"{here}\b|{home}|/home/\w+/|/tmp/\w")
    guilty = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in _tracked()
        if path.suffix in TEXTS
        and path != Path(__file__).resolve()
        and (found := local.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert not guilty


def test_checkpoints_are_small() -> None:
    large = [path for path in (ROOT / "examples" / "checkpoints").rglob("*") if path.is_file()]
    assert not [path for path in large if path.stat().st_size > CHECKPOINT_BYTES]


def _includes(folder: str) -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".c", ".cc", ".cpp", ".cu", ".h", ".hpp"}
        for name in INCLUDE.findall(path.read_text(encoding="utf-8"))
    ]


def _framework(name: str) -> str | None:
    """Whose header it is, None for ours and the standard library's."""
    ours = name.startswith(("backends/", "titans/"))
    return None if ours else next((owner for owner, pattern in FRAMEWORKS.items() if pattern.search(name)), None)


def test_only_backends_include_their_frameworks() -> None:
    found = [(path, name, owner) for path, name in _includes("runtime") if (owner := _framework(name)) is not None]
    assert found, "the patterns find nothing, so they prove nothing"
    assert not [(path, name) for path, name, owner in found if Path(path).parent != BACKENDS / owner]


def _room(path: str) -> str:
    """The room of a path below runtime/src: "base", "backends/tensorrt"."""
    return Path(path).parent.as_posix()


def test_rooms_have_an_order() -> None:
    rooms = list(ROOMS)
    assert all(rooms.index(used) < rooms.index(room) for room, allowed in ROOMS.items() for used in allowed)


def test_rooms_include_only_the_rooms_that_they_may() -> None:
    source = ROOT / "runtime" / "src"
    ours = {path.relative_to(source).as_posix() for path in source.rglob("*.h")}
    found = [(path, name) for path, name in _includes("runtime/src") if not name.startswith(("titans/", "plugins/"))]
    wrong = []
    for path, name in found:
        room = _room(str(Path(path).relative_to("runtime/src")))
        assert room in ROOMS, f"{path} is in no room of the table"
        if name not in ours or _room(name) in {room, *ROOMS[room]}:
            continue
        wrong.append((path, name))
    assert {_room(name) for _, name in found if name in ours} >= set(ROOMS) - {"api"}
    assert not wrong


def test_includes_of_the_runtime_name_their_room() -> None:
    headers = {path.name for path in (ROOT / "runtime" / "src").rglob("*.h")}
    assert not [(path, name) for path, name in _includes("runtime") if name in headers]


def test_kernels_include_no_framework() -> None:
    if not (ROOT / "plugins" / "kernels").is_dir():
        pytest.skip("no kernels yet: the operator runs as its function of standard operators")
    assert not [(path, name) for path, name in _includes("plugins/kernels") if _framework(name) is not None]


def test_public_headers_need_only_standard_headers() -> None:
    assert not [
        (path, name) for path, name in _includes("runtime/include") if "/" in name and not name.startswith("titans/")
    ]
