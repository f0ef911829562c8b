"""Options from variables and files, quiet and detailed output, names with suggestions, and paths of the wrong kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_tools import TEXT, invoke

from titans_export.checkpoint_formats import FORMATS
from titans_export.cli import main
from titans_export.cli.choices import DEVICE, FORMAT, RECIPE, TARGET
from titans_export.cli.kinds import kind_of

pytest_plugins = ["cli_fixtures"]
SHORT = ("--max-tokens", 2, "--json")


@pytest.fixture
def options(tmp_path: Path) -> Path:
    path = tmp_path / "options.toml"
    path.write_text('[run]\nmax-tokens = 3\nseed = 5\nstop = ["zz"]\n[verify]\ntokens = 8\n')
    return path


def test_options_override_variables_and_these_the_file(
    options: Path, shared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--options", options, "run", shared_bundle, "--prompt", "a", "--json")
    assert invoke(*args).json()["generated_tokens"] == 3
    monkeypatch.setenv("TITANS_RUN_MAX_TOKENS", "2")
    assert invoke(*args).json()["generated_tokens"] == 2
    assert invoke(*args, "--max-tokens", 1).json()["generated_tokens"] == 1
    monkeypatch.setenv("TITANS_OPTIONS", str(options))
    assert invoke("verify", shared_bundle, "--json").json()["positions"] == 8
    monkeypatch.setenv("TITANS_RUN_TEMPERATURE", "hot")
    invoke("run", shared_bundle, "--prompt", "a").check_failure(2, "TITANS-E0104", "hot")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run", ("not TOML",)),
        ("[rnu]\n", ("unknown command 'rnu'",)),
        ("run = 3\n", ("unknown command 'run'",)),
        ("[run]\nmax-token = 3\n", ("unknown option 'max-token' of run", "run --help")),
        ("[serve]\nport = 1\n", ("serve does not read this file", "--print-config")),
    ],
)
def test_a_wrong_file_of_options(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(text)
    invoke("--options", tmp_path / "options.toml", "run", "x.titans").check_failure(2, "TITANS-E0105", *words)


def test_quiet_and_details(shared_bundle: Path) -> None:
    normal, details = invoke("verify", shared_bundle), invoke("verify", shared_bundle, "-v")
    assert normal.out.startswith("passed: ")
    assert "token by token" not in normal.out
    assert details.out.startswith(normal.out)
    assert "token by token" in details.out
    noisy = ("verify", shared_bundle, "--tokens", 1)
    assert "did not run" in invoke(*noisy).err
    assert invoke(*noisy, "-q").err == ""
    assert "did not run" in invoke(*noisy).err, "the next command is quiet too"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("export", "x", "-o", "y.titans", "--format", "titan-pytorch"), ("expected one of", "titans-pytorch")),
        (("export", "x", "-o", "y.titans", "--format", "?"), ("expected one of", *FORMATS)),
        (("quantize", "x", "-o", "y.titans", "--recipe", "int8-weights-only"), ("int8-weight-only",)),
        (("build", "x", "--target", "rtx40"), ("did you mean rtx-40",)),
        (("run", "x", "--device", "gpu"), ("unknown device 'gpu'", "cuda")),
    ],
)
def test_an_unknown_name_is_a_usage_error(args: tuple[str, ...], words: tuple[str, ...]) -> None:
    invoke(*args).check_failure(2, "TITANS-E0104", *words)


def test_names_are_completed() -> None:
    context = main.make_context("titans-export", ["--help"], resilient_parsing=True)
    parameter = main.commands["build"].params[0]

    def completed(kind: object, start: str) -> list[str]:
        return [item.value for item in kind.shell_complete(context, parameter, start)]  # type: ignore[attr-defined]

    assert completed(FORMAT, "titans-") == ["titans-pytorch", "titans-pytorch-mlx"]
    assert "int8-weight-only" in completed(RECIPE, "int8")
    assert "rtx-40" in completed(TARGET, "rtx")
    assert completed(DEVICE, "c") == ["cpu", "cuda", "cuda:0"]
    assert DEVICE.convert("cuda:3", None, None) == "cuda:3"


def test_a_path_of_the_wrong_kind(shared_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    state, book = tmp_path / "user.tstate", tmp_path / "book.txt"
    book.write_bytes(TEXT)
    assert invoke("run", shared_bundle, "--prompt", "a", "--state", state, *SHORT).code == 0
    assert [kind_of(path) for path in (shared_bundle, state, checkpoint, book, tmp_path, tmp_path / "x")] == [
        "bundle", "state", "checkpoint", "text", "folder", "nothing",
    ]  # fmt: skip
    for path, words in (
        (state, ("a state file", "--state")),
        (checkpoint, ("a checkpoint", "titans-export export")),
        (book, ("another kind", "--text")),
        (tmp_path, ("manifest.json",)),
        (tmp_path / "none", ("does not exist",)),
    ):
        for args in (("run", path, "--prompt", "a"), ("verify", path), ("build", path, "--target", "cpu")):
            invoke(*args).check_failure(1, "TITANS-E0201", *words)
    invoke("export", shared_bundle, "-o", tmp_path / "y.titans").check_failure(1, "is a bundle", "titans-export run")
    invoke("export", state, "-o", tmp_path / "y.titans").check_failure(1, "is a state file", "--state")
    invoke("inspect", book).check_failure(1, "TITANS-E0401", "another kind")
    invoke("diff", shared_bundle, state).check_failure(1, "TITANS-E0401", "is a bundle", "inspect")
    before = book.read_bytes()
    invoke("run", shared_bundle, "--prompt", "a", "--state", book).check_failure(1, "TITANS-E0401")
    assert book.read_bytes() == before


class TestState:
    """`run --state`: two runs are one stream."""

    def test_two_runs_are_one_stream(self, shared_bundle: Path, tmp_path: Path) -> None:
        first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
        first.write_bytes(TEXT[:300])
        second.write_bytes(TEXT[300:])
        whole.write_bytes(TEXT)
        state, other = tmp_path / "user.tstate", tmp_path / "whole.tstate"
        for text in (first, second):
            report = invoke("run", shared_bundle, "--text", text, "--state", state, "--json").json()
        assert (report["position_at_start"], report["position"]) == (300, len(TEXT))
        assert report["state"] == str(state)
        assert invoke("run", shared_bundle, "--text", whole, "--state", other).code == 0
        assert invoke("diff", state, other).code == 0, "the states of the two runs and of one run differ"

    def test_a_frozen_run_does_not_freeze_the_stream(self, shared_bundle: Path, tmp_path: Path) -> None:
        args = ("run", shared_bundle, "--prompt", "a", "--state", tmp_path / "s.tstate", *SHORT)
        assert invoke(*args, "--freeze").json()["learning"] is False
        assert invoke(*args).json()["learning"] is True

    def test_with_a_key(self, shared_bundle: Path, tmp_path: Path) -> None:
        state, key, other = (tmp_path / name for name in ("s.tstate", "key", "other"))
        key.write_bytes(bytes(range(32)))
        other.write_bytes(bytes(32))
        args = ("run", shared_bundle, "--prompt", "a", "--state", state, *SHORT)
        assert invoke(*args, "--key-file", key).code == 0
        before = state.read_bytes()
        invoke(*args, "--key-file", other).check_failure(1, "TITANS-E0405")
        invoke(*args).check_failure(1, "TITANS-E0406")
        assert state.read_bytes() == before
        assert invoke(*args, "--key-file", key).json()["position_at_start"] == 3
        invoke("run", shared_bundle, "--prompt", "a", "--key-file", key).check_failure(2, "--key-file needs --state")

    def test_a_run_that_fails_leaves_the_file(self, shared_bundle: Path, tmp_path: Path) -> None:
        state = tmp_path / "s.tstate"
        args = ("run", shared_bundle, "--state", state)
        assert invoke(*args, "--prompt", "a", *SHORT).code == 0
        before = state.read_bytes()
        assert invoke(*args, "--text", tmp_path / "none.txt").code == 1
        assert state.read_bytes() == before
        invoke(*args[:2], "--prompt", "a", "--state", tmp_path / "no" / "s.tstate").check_failure(1, "TITANS-E1007")


def test_the_commands_as_functions(checkpoint: Path, shared_bundle: Path, tmp_path: Path) -> None:
    import titans_export
    from titans_export.errors import BundleError, OutputError, UsageError

    copy = Path(shutil.copytree(shared_bundle, tmp_path / "copy.titans"))
    report = titans_export.verify(str(copy), tokens=16)
    assert report.passed
    assert report.positions == 16
    assert not titans_export.verify(copy, tokens=16, tolerance=0.0).passed
    small = tmp_path / "int8.titans"
    quantized = titans_export.quantize(copy, small, "int8-weight-only", memory="bfloat16")
    assert quantized.weights_bytes < quantized.float32_weights_bytes
    built = titans_export.build(str(small), "cpu")
    assert json.loads((small / "manifest.json").read_text())["engines"][0]["name"] == built.engine["name"]
    with pytest.raises(OutputError, match="exists"):
        titans_export.export(checkpoint, copy)
    with pytest.raises(FileNotFoundError) as missing:
        titans_export.verify(tmp_path / "none.titans")
    assert isinstance(missing.value, BundleError)
    with pytest.raises(UsageError, match="unknown format"):
        titans_export.export(checkpoint, tmp_path / "x.titans", format="keras")


@pytest.mark.parametrize("standard", [False, True])
def test_the_operators_of_a_reduced_build(shared_bundle: Path, tmp_path: Path, standard: bool) -> None:
    """The list has every operator of the graphs that ONNX Runtime runs, before and after its optimisation."""
    import onnx

    args = ("ops", shared_bundle, *(["--standard-operators"] if standard else []))
    result = invoke(*args, "-o", tmp_path / "ops.config")
    assert result.code == 0, result.err
    lines = (tmp_path / "ops.config").read_text()
    assert invoke(*args).out == lines
    found = {name for line in lines.splitlines() for name in line.split(";")[2].split(",")}
    for path in shared_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {node.op_type for node in model.graph.node if not node.domain} <= found
    assert "SimplifiedLayerNormalization" in found, "ONNX Runtime's own operators are missing"
    assert not found & {"NeuralMemory", "CachedAttention"}
    assert ("Scan" in found or "Einsum" in found or "Softmax" in found) or not standard
    report = invoke(*args, "--json").json()
    assert {name for row in report["operators"] for name in row["operators"]} == found
