"""What all commands share: help, usage errors, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from cli_tools import Result, environment, invoke, spawn

from titans_export.cli import main
from titans_export.cli.command import Command, emit
from titans_export.cli.failures import explain
from titans_export.cli.table import size, table
from titans_export.errors import MachineError, MismatchError, UsageError

pytest_plugins = ["cli_fixtures"]
COMMANDS = ("bench", "build", "compare", "diff", "doctor", "export", "inspect", "ops", "quantize", "run", "verify")


def test_help_shows_the_typical_use() -> None:
    result = invoke("--help")
    assert result.code == 0
    for step in ("titans-export export ", "titans-export verify ", "titans-export run ", "_TITANS_EXPORT_COMPLETE"):
        assert step in result.out
    assert invoke() == result


def test_version() -> None:
    assert invoke("--version").out.startswith("titans-export 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = invoke(name, "--help")
    assert result.code == 0
    assert f"Examples:\n  titans-export {name}" in result.out
    assert "--json" in result.out
    options = [parameter for parameter in main.commands[name].params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("run",),
        ("run", "a.titans", "--nope"),
        ("run", "a.titans", "--temperature", "-1"),
        ("run", "a.titans", "--prompt", "a", "--stop", ""),
        ("run", "a.titans"),
        ("export", "a"),
        ("export", "a", "-o", "b.titans", "--chunks-per-call", "0"),
        ("verify", "a.titans", "--text", "b.txt"),
        ("verify", "a.titans", "--tokens", "many"),
        ("compare", "a.titans"),
        ("compare", "a.titans", "b.titans", "--tolerance", "nan"),
    ],
    ids=" ".join,
)
def test_usage_errors(args: tuple[str, ...]) -> None:
    result = invoke(*args)
    result.check_failure(2, "TITANS-E010")
    assert result.out == ""


def test_an_unknown_option_is_named() -> None:
    result = invoke("run", "--foo")
    assert (
        result.err == "titans-export: [usage] unknown option --foo. Fix: see titans-export run --help (TITANS-E0101)\n"
    )
    invoke("run", "a.titans", "--promt", "x").check_failure(2, "unknown option --promt. Fix: use --prompt, or see ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """As the shell calls it: the script, then the words."""
    script = "from titans_export.cli import main; main()"
    env = environment(_TITANS_EXPORT_COMPLETE=f"{shell}_source")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "_TITANS_EXPORT_COMPLETE" in done.stdout or shell == "bash"  # an old bash gives a warning instead
    env = environment(_TITANS_EXPORT_COMPLETE=f"{shell}_complete", COMP_WORDS="titans-export ver", COMP_CWORD="1")
    if shell == "fish":
        env["COMP_CWORD"] = "ver"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "verify" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from titans_export.cli import main\n"
        "try: main(['run', '--help'])\n"
        "finally: print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'tqdm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.stderr.strip() == "[]"


def _failing(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return Command("fail", callback=fail)


def _run_failing(error: BaseException, *args: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setitem(main.commands, "fail", _failing(error))
    return invoke("fail", *args)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MismatchError("E0901", "a", "b", "c"), 3, "[a] b. Fix: c (TITANS-E0901)"),
        (MachineError("E0650", "a", "b\nb", "c"), 4, "b b"),
        (UsageError("E0102", "a", "b", "c"), 2, "[a]"),
        (KeyboardInterrupt(), 1, "[interrupted]"),
        (OSError(28, "No space left on device", "/x"), 1, "free some space"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x"),
        (MemoryError(), 1, "[memory]"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 4, "pip install onnx"),
        (ImportError("[titans_runtime] no library. Fix: build it (TITANS-E0601)"), 4, "build it"),
        (ZeroDivisionError("a\nb"), 1, "ZeroDivisionError: a b"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_is_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_failing(error, monkeypatch=monkeypatch).check_failure(code, words)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_failing(ZeroDivisionError("a"), "--debug", monkeypatch=monkeypatch)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "[internal]" in result.err.splitlines()[-1]


@pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 1), (4, 4)])
def test_runtime_errors_have_exit_codes(status: int, code: int) -> None:
    rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    line = "[x] a. Fix: b (TITANS-E0501)"
    assert explain(rt.Error(line, status)) == (line, code)


def test_a_closed_pipe_is_no_traceback(shared_bundle: object) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "titans_export.cli", "inspect", str(shared_bundle), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert child.stdout
    child.stdout.close()
    assert child.stderr
    assert child.stderr.read() == b""
    assert child.wait() == 1


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_tables_line_up() -> None:
    lines = table(("name", "n"), [("a", 5), ("long", 12)]).splitlines()
    assert lines == ["name   n", "a      5", "long  12"]
    assert [size(n) for n in (999, 1536, 20 << 20)] == ["999 B", "1.5 KiB", "20.0 MiB"]


def test_it_runs_as_a_module() -> None:
    assert spawn("--version").out.startswith("titans-export ")
