"""The campaign behind the table of docs/quantization.md, over a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TEXT
from click.testing import CliRunner

from benchmarks import quantization, table

pytest_plugins = ["drift_fixtures"]


@pytest.fixture
def settings(drift_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Arguments of a run over one small model and two recipes, of which one is not there to be run."""
    model = quantization.Model("small", drift_bundle, 700, stream_length=350, longest_recall=64)
    monkeypatch.setattr(quantization, "MODELS", (model,))
    work = tmp_path / "work"
    work.mkdir()
    (work / "small.titans").symlink_to(drift_bundle)
    (tmp_path / "text.txt").write_bytes(TEXT * 3)
    return (
        "--calibration", tmp_path / "text.txt", "--text", tmp_path / "text.txt", "--recipe", "int8-weight-only",
        "--calibration-tokens", 1024, "--window", 350, "--rounds", 1, "--prefill-tokens", 32, "--decode-tokens", 8,
        "--threads", 1, "--work", work, "-o", tmp_path / "result.json",
    )  # fmt: skip


def run(*args: object) -> Any:
    return CliRunner().invoke(quantization.main, [str(arg) for arg in args])


def test_a_run(settings: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*settings)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "result.json").read_text())
    (model,) = report["models"]
    base, int8 = model["recipes"]
    assert (base["name"], int8["name"], int8["unavailable"]) == ("float32", "int8-weight-only", None)
    assert int8["weights_bytes"] < base["weights_bytes"]
    assert int8["bits_per_token"] == pytest.approx(base["bits_per_token"] * (1 + int8["bits_difference"]), rel=1e-4)
    assert [len(entry["windows"]) for entry in (base, int8)] == [2, 2]
    assert int8["kl_mean"] > 0 and int8["memory"]["weights"] > 0
    for entry in (base, int8):
        assert entry["prefill"]["tokens_per_second"] > 0 and entry["decode"]["tokens_per_second"] > 0
        assert [row["distance"] for row in entry["recall"]["distances"]] == [64]
    # What was measured is not measured again, and the page takes it.
    monkeypatch.setattr(quantization, "measure", None)
    assert run(*settings).exit_code == 0
    assert json.loads((tmp_path / "result.json").read_text())["models"] == report["models"]
    page = f"{table.MARKERS[0].format('quantization')}\nold\n{table.MARKERS[1]}\n"
    filled = table.fill(page, table.quantization_blocks(tmp_path))
    assert "old" not in filled and "| int8-weight-only |" in filled and "| float32 |" in filled
    assert f"{int8['bits_per_token']:.4f}" in filled


def test_a_recipe_that_does_not_work_here_is_told(
    settings: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import titans_runtime

    opened = quantization._open

    def refuse(path: Path, given: quantization.Settings) -> Any:
        if "int8" in path.name:
            raise titans_runtime.Error("[session] expected a kernel but got none; do install it", 4)
        return opened(path, given)

    monkeypatch.setattr(quantization, "_open", refuse)
    result = run(*settings)
    assert result.exit_code == 0, result.output
    (model,) = json.loads((tmp_path / "result.json").read_text())["models"]
    base, int8 = model["recipes"]
    assert "expected a kernel" in int8["unavailable"] and "bits_per_token" not in int8
    assert base["bits_per_token"] > 0
    assert "- int8-weight-only: needs a kernel, found none" in table.quantization_blocks(tmp_path)["quantization"]


def test_without_results(tmp_path: Path) -> None:
    assert table.quantization_blocks(tmp_path) == {"quantization": "Not measured yet."}


def test_the_page_holds_the_results() -> None:
    if not table.QUANTIZATION.is_file():
        pytest.skip("docs/quantization.md is not there")
    page = table.QUANTIZATION.read_text(encoding="utf-8")
    assert table.fill(page, table.quantization_blocks(), table.QUANTIZATION) == page, "run python -m benchmarks.table"
