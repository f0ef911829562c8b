"""The commands and snippets of README and docs: all of them parse, and README's work as printed."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from shared_bundles import ROOT

from titans_export.cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
# Values in the place of words that stand for any name.
PLACEHOLDERS = {"NAME": "titans", "SEED": "1", "N": "1", "DATE": "2026-01-01", "DISK": "."}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(page: Path) -> Iterator[str]:
    """Lines that call a program of ours, without comments and prompts; a line that goes on is one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"```text.*?```", "", text, flags=re.DOTALL)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    for line in [*"".join(blocks).splitlines(), *re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]:
        line = re.split(r"\s#\s|\s{3,}(?=[a-z0-9])", line.strip())[0].strip()
        line = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
        if re.match(r"(titans-export|python -m benchmarks\.|tools/|make )", line):
            yield line


CASES = [(page, line) for page in PAGES for line in commands(page)]


def arguments(line: str) -> list[str]:
    """The words after the program, up to a pipe, a redirection or the shell's `&`."""
    words = shlex.split(line.replace("[--", "--").replace("]", ""))
    ends = [at for at, word in enumerate(words) if word in ("|", ">", ">>", "<", "&", "&&")]
    return [PLACEHOLDERS.get(word, word) for word in words[: min(ends, default=len(words))]]


def parse(program: click.Command, name: str, words: list[str], parent: click.Context | None = None) -> None:
    """As click does before it calls a command. Fails for an unknown command, option or value."""
    if not isinstance(program, click.Group):
        with program.make_context(name, words, parent):
            return
    with program.make_context(name, list(words), parent) as context:
        rest = [*context._protected_args, *context.args]
        if rest:
            called, command, rest = program.resolve_command(context, rest)
            assert command is not None
            parse(command, str(called), rest, context)


def test_there_are_commands() -> None:
    assert len(CASES) > 80


@pytest.mark.parametrize(("page", "line"), CASES, ids=[f"{page.name}: {line}" for page, line in CASES])
def test_every_command_parses(page: Path, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, *words = arguments(line)
    if program == "titans-export":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "options.toml").touch()
        parse(main, program, words)
    elif program == "python":
        module = importlib.import_module(words[1])
        if isinstance(module.main, click.Command):
            try:
                parse(module.main, words[1], words[2:])
            except click.BadParameter as error:
                assert "does not exist" in error.message  # a file that the reader has
        else:  # argparse: its options are literals
            source = Path(str(module.__file__)).read_text(encoding="utf-8")
            assert not [word for word in words[2:] if word.startswith("-") and f'"{word}"' not in source]
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert targets
        assert words[0] in targets[1].split()
    else:
        assert os.access(ROOT / program, os.X_OK)


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"no block of {language}"
    return found[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README's commands read, and the bundle they make first."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "README.md", folder / "book.txt")
    for line in block(README, "sh").splitlines():
        if line.startswith("titans-export"):
            typed(folder, line)
    return folder


def typed(folder: Path, line: str) -> str:
    """The output of a line in a shell. The program is that of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=500,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.long
def test_readme_command_line(checkout: Path) -> None:
    lines = [line.split("   #")[0].strip() for line in section("Ten lines of Python").splitlines()]
    lines = [line for line in lines if line.startswith("titans-export ")]
    # `bench` takes minutes and has tests of its own; the engine for an RTX GPU needs tensorrt-rtx.
    needs = {"bench": False, "--target rtx-40": importlib.util.find_spec("tensorrt_rtx") is not None}
    assert len(lines) >= 9
    for line in lines[1:]:
        if all(possible for word, possible in needs.items() if word in line):
            typed(checkout, line)


@pytest.mark.long
def test_tutorials(checkout: Path) -> None:
    """The commands of the first two tutorials, in order, in one folder. test_dist.py has the third one's program."""
    folder = checkout / "tutorials"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "README.md", folder)
    for name in ("first-run", "quantise"):
        text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        for language, code in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
            if language == "python":
                (folder / "snippet.py").write_text(code + "\nassert stream.position > 8_000 and len(text) == 40\n")
                typed(folder, "python snippet.py")
            else:
                for line in code.splitlines():
                    typed(folder, line)
    assert (folder / "drift.html").stat().st_size > 10_000


@pytest.mark.long
def test_readme_python(checkout: Path) -> None:
    code = block(section("Ten lines of Python"), "python")
    (checkout / "snippet.py").write_text(
        code + "\nassert len(text) == 64 and twin.position > 0 and not twin.learning\n"
    )
    typed(checkout, "python snippet.py")


@pytest.mark.long
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_readme_c(checkout: Path, language: str) -> None:
    from titans_runtime._library import _library_path, backend_library

    code = block(section("Ten lines of Python"), language)
    includes = "\n".join(line for line in code.splitlines() if line.startswith("#include"))
    body = "\n".join(line for line in code.splitlines() if not line.startswith("#include"))
    before = {
        "c": "#include <stdio.h>\n",
        "cpp": "#include <cstdio>\n#include <vector>\nstatic int used = 0;\n"
        "static void use(std::int32_t) { ++used; }\n",
    }[language]
    ready = "" if language == "c" else "std::vector<std::int32_t> prompt{79, 110, 99, 101};\n"
    after = (
        "return stream == NULL;" if language == "c" else 'std::printf("%d", used); return used != 64;'
    )  # the defaults of all languages end after 64 tokens
    source = checkout / f"snippet.{language}"
    source.write_text(f"{includes}\n{before}int main(void) {{\n{ready}{body}\n{after}\n}}\n")
    library = Path(_library_path())
    compiler = "cc -std=c11" if language == "c" else "c++ -std=c++17"
    typed(checkout, f"{compiler} -I{ROOT}/runtime/include {source} {library} -Wl,-rpath,{library.parent} -o snippet")
    typed(checkout, f"TITANS_ONNXRUNTIME={backend_library()} ./snippet")
