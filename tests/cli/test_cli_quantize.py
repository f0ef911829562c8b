"""`titans-export quantize`: what it writes, and every input that it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import pytest
from calibration_tools import TOKENS
from cli_tools import invoke, reseal
from safetensors.numpy import load_file

from titans_calibration.options import QuantizeOptions, work_file
from titans_calibration.quantize import plan_quantize, quantize_bundle
from titans_calibration.recipe import MemoryRecipe, MixedRecipe, load_recipe, recipe_names
from titans_export.bundle import read_bundle
from titans_export.onnx import files
from titans_export.safetensors_file import write_safetensors

pytest_plugins = ["calibration_fixtures"]
rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
HEAD = "model.head.weight"


def _options(bundle: Path, text: Path, output: Path, recipe: str = "int8") -> list[object]:
    return [bundle, "-o", output, "--recipe", recipe, "--data", text, "--tokens", TOKENS]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "int8.titans"


@pytest.fixture(autouse=True)
def _folder(output: Path) -> None:
    output.parent.mkdir()


def test_a_bundle_in_int8(float32_bundle: Path, long_text: Path, output: Path) -> None:
    result = invoke("quantize", *_options(float32_bundle, long_text, output), "--seed", 3, "--json")
    assert result.code == 0, result.err
    report = result.json()
    assert report["bundle"] == str(output)
    assert report["recipe"] == load_recipe("int8").as_dict() | {"keep": []}
    assert (report["tokens"], report["seed"], report["data"]["streams"]) == (TOKENS, 3, 1)
    assert report["matmuls"][HEAD] == "int8"
    assert set(report["kept"]) == {name for name, format in report["matmuls"].items() if format == "float32"}
    assert report["weights_bytes"] < 0.4 * report["float32_weights_bytes"]
    assert report["state_bytes"] == report["float32_state_bytes"]
    assert report["activations"][HEAD][0][0] == 0
    assert report["activations"][HEAD][0][1] < 0 < report["activations"][HEAD][0][2]
    assert "layers.0.memory.W0" in report["memory"]
    assert report["mixed"] is None
    manifest = read_bundle(output).manifest.raw
    assert manifest["quantization"]["data"] == report["data"]
    assert manifest["quantization"]["max_abs_error"] == report["max_abs_error"]
    assert manifest["golden"]["tolerance"] == report["tolerance"] >= report["max_abs_error"]
    assert list(output.parent.iterdir()) == [output]
    golden = read_bundle(float32_bundle).golden()
    inputs, right = golden.inputs, golden.values
    with rt.Session(output, threads=1) as session:
        got = session.stream().feed(inputs)
    assert got is not None
    assert 0 < np.abs(got - right).max() <= report["tolerance"]
    again = invoke("quantize", output, "-o", output.with_name("b.titans"), "--recipe", "fp16")
    again.check_failure(2, "already quantised")


def test_options_reach_the_recipe(float32_bundle: Path, output: Path) -> None:
    options = ["--recipe", "fp16", "--keep", "model.head.*", "--keep", "nothing"]
    done = invoke("quantize", float32_bundle, "-o", output, *options, "--json")
    assert "no weight matches nothing" in done.err and "model.head" not in done.err
    report = done.json()
    assert report["matmuls"][HEAD] == "float32"
    assert set(report["matmuls"].values()) == {"float32", "float16"}
    assert (report["tokens"], report["data"]) == (0, None)
    invoke("quantize", float32_bundle, "-o", output, *options).check_failure(1, "--overwrite")
    done = invoke("quantize", float32_bundle, "-o", output, "--recipe", "bf16", "--overwrite")
    assert done.code == 0, done.err
    assert "bfloat16" in done.out


def test_a_mixture_within_a_budget_of_bytes(float32_bundle: Path, long_text: Path, output: Path) -> None:
    recipe = output.with_name("mine.toml")
    sizes = {}
    for budget in (180_000, 240_000, 10**9):
        recipe.write_text(
            f'[weights]\nformat = "int8"\n[activations]\nformat = "int8"\n[mixed]\nmax_weights_bytes = {budget}\n'
        )
        result = invoke(
            "quantize", *_options(float32_bundle, long_text, output, str(recipe)), "--tokens", 1600, "--json",
            "--overwrite",
        )  # fmt: skip
        assert result.code == 0, result.err
        report = result.json()
        mixed = report["mixed"]
        assert mixed["weights_bytes"] <= budget
        sizes[budget] = mixed["weights_bytes"]
        kept = {name for s in mixed["sensitivities"] if s["name"] in mixed["kept"] for name in s["matmuls"]}
        assert kept == {name for name, why in report["kept"].items() if why == "so chosen"}
        costs = [s["divergence"] / s["saved_bytes"] for s in mixed["sensitivities"]]
        assert costs == sorted(costs, reverse=True)
        assert mixed["kept"] == [s["name"] for s in mixed["sensitivities"]][: len(mixed["kept"])]
    assert sizes[180_000] < sizes[240_000] < sizes[10**9]
    assert mixed["bits"] == pytest.approx(mixed["float32_bits"], rel=1e-6)  # everything fits in float32
    recipe.write_text('[weights]\nformat = "int8"\n[mixed]\nmax_weights_bytes = 1000\n')
    options = _options(float32_bundle, long_text, output.with_name("b.titans"), str(recipe))
    invoke("quantize", *options, "--tokens", 1600).check_failure(1, "1000 bytes", "max_weights_bytes")


def test_a_dry_run_writes_nothing(float32_bundle: Path, long_text: Path, output: Path) -> None:
    result = invoke("quantize", *_options(float32_bundle, long_text, output), "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = result.json()
    assert plan["matmuls"] > 5
    assert plan["elements"] > plan["matmuls"] * 4096
    assert plan["data"]["tokens"] == TOKENS
    assert list(output.parent.iterdir()) == []
    shown = invoke("quantize", *_options(float32_bundle, long_text, output), "--dry-run")
    assert "matmuls" in shown.out and "int8" in shown.out


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name: str, float32_bundle: Path, long_text: Path) -> None:
    plan = plan_quantize(QuantizeOptions(float32_bundle, None, load_recipe(name), (long_text,), tokens=1600))
    assert plan.recipe["name"] == name
    assert (plan.matmuls > 0) == (load_recipe(name).weights.format != "float32")


def test_recipes_are_listed() -> None:
    listed = invoke("quantize", "--list-recipes", "--json").json()["recipes"]
    assert [recipe["name"] for recipe in listed] == recipe_names()
    assert all(name in invoke("quantize", "--list-recipes").out for name in recipe_names())


@pytest.mark.parametrize("missing", ["bundle", "output", "recipe"])
def test_what_is_missing_is_named(missing: str, float32_bundle: Path, output: Path) -> None:
    given = {"bundle": [float32_bundle], "output": ["-o", output], "recipe": ["--recipe", "fp16"]}
    args = [arg for name, part in given.items() if name != missing for arg in part]
    words = {"bundle": "BUNDLE", "output": "-o", "recipe": "--recipe"}
    invoke("quantize", *args).check_failure(2, f"missing {words[missing]}")


@pytest.mark.parametrize("target", ["orin-nano", "rtx-30", "a100", "cpu"])
def test_targets_without_fp8_are_refused(target: str, float32_bundle: Path, long_text: Path, output: Path) -> None:
    options = _options(float32_bundle, long_text, output, "fp8")
    result = invoke("quantize", *options, "--target", target)
    result.check_failure(4, "fp8", "8.9", "--recipe int8")
    assert list(output.parent.iterdir()) == []


def test_targets_that_take_a_recipe(float32_bundle: Path, long_text: Path, output: Path) -> None:
    for recipe, target in (("fp8", "rtx-40"), ("int8", "orin-agx"), ("bf16", "cpu")):
        options = _options(float32_bundle, long_text, output, recipe)
        assert invoke("quantize", *options, "--target", target, "--dry-run").code == 0
    options = _options(float32_bundle, long_text, output)
    invoke("quantize", *options, "--target", "orin").check_failure(2, "orin-nano", "orin")


def _refuse(code: int, words: tuple[str, ...], output: Path, *args: object) -> None:
    """It fails so, and leaves nothing behind."""
    before = set(output.parent.iterdir())
    invoke("quantize", *args).check_failure(code, *words)
    assert set(output.parent.iterdir()) == before


def test_wrong_recipes(float32_bundle: Path, long_text: Path, output: Path) -> None:
    wrong = output.with_name("wrong.toml")
    wrong.write_text("bits = 8")
    for recipe, words in (
        (str(output.with_name("none.toml")), ("none.toml", "cannot be read")),
        (str(wrong), ("wrong.toml", "bits")),
    ):
        _refuse(1, words, output, *_options(float32_bundle, long_text, output, recipe))
    _refuse(2, ("int9", "int8"), output, *_options(float32_bundle, long_text, output, "int9"))
    for memory in ("int4", "int8:up"):
        options = _options(float32_bundle, long_text, output)
        _refuse(1, ("--memory", "memory."), output, *options, "--memory", memory)


def test_wrong_data(float32_bundle: Path, long_text: Path, output: Path) -> None:
    bare = [float32_bundle, "-o", output, "--recipe", "int8"]
    short, ids = output.with_name("short.txt"), output.with_name("ids.jsonl")
    short.write_bytes(long_text.read_bytes()[:1000])
    ids.write_text(json.dumps([1, 2, 256]))
    _refuse(2, ("--data", "int8"), output, *bare)
    _refuse(1, ("1024", "1000"), output, *bare, "--data", short)
    _refuse(1, ("1024", "100"), output, *bare, "--data", long_text, "--tokens", 100)
    _refuse(1, ("0 to 255", "256 at 2", "line 1"), output, *bare, "--data", ids)
    _refuse(1, ("does not exist",), output, *bare, "--data", output.with_name("none.txt"))
    _refuse(2, ("--tokens",), output, *bare, "--data", long_text, "--tokens", 0)


def test_wrong_bundles_and_outputs(float32_bundle: Path, long_text: Path, output: Path, tmp_path: Path) -> None:
    _refuse(1, ("none does not exist", "NAME.titans"), output, *_options(tmp_path / "none", long_text, output))
    damaged = Path(shutil.copytree(float32_bundle, tmp_path / "damaged.titans"))
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    _refuse(1, ("weights.safetensors", "hash"), output, *_options(damaged, long_text, output))
    _refuse(2, ("the bundle itself",), output, *_options(float32_bundle, long_text, float32_bundle), "--overwrite")
    _refuse(1, ("create the folder",), output, *_options(float32_bundle, long_text, tmp_path / "no" / "x.titans"))


def test_a_memory_that_cannot_be_stored_so_is_refused_before_any_work(
    float32_bundle: Path, long_text: Path, output: Path, tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(float32_bundle, tmp_path / "foreign.titans"))
    manifest = json.loads((foreign / "manifest.json").read_text())
    for entry in manifest["state"]:
        entry.pop("layout", None)
    manifest.pop("guard", None)  # it names fields of the layout
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    options = [*_options(foreign, long_text, output), "--memory", "int8"]
    for more in ((), ("--dry-run",)):
        result = invoke("quantize", *options, *more)
        result.check_failure(1, "layers.0.memory", "NeuralMemory", 'memory.dtype "float32"')
        assert "observing" not in result.err


def test_a_model_that_leaves_the_numbers(float32_bundle: Path, long_text: Path, output: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(float32_bundle, tmp_path / "damaged.titans"))
    weights = dict(load_file(damaged / "weights.safetensors"))
    weights["model.embedding"][ord("e")] = np.nan
    write_safetensors(damaged / "weights.safetensors", weights)
    reseal(damaged)
    _refuse(1, ("finite", "model.layers.0", "position", "text.txt"), output, *_options(damaged, long_text, output))


def test_a_damaged_work_file_costs_only_time(float32_bundle: Path, long_text: Path, output: Path) -> None:
    work_file(output).write_bytes(b"PK nothing of ours")
    result = invoke("quantize", *_options(float32_bundle, long_text, output), "--json")
    assert result.code == 0, result.err
    assert result.json()["resumed_at"] == 0
    assert not work_file(output).exists()


def test_the_plan_is_what_is_done(float32_bundle: Path, long_text: Path, output: Path) -> None:
    recipe = dataclasses.replace(load_recipe("int8"), keep=("model.layers.0.ff.*",))
    plan = plan_quantize(QuantizeOptions(float32_bundle, output, recipe, (long_text,), tokens=TOKENS))
    options = _options(float32_bundle, long_text, output)
    report = invoke("quantize", *options, "--keep", "model.layers.0.ff.*", "--json").json()
    assert plan.kept == report["kept"]
    assert plan.matmuls == len(report["matmuls"]) - len(report["kept"])


def test_each_graph_is_read_once(
    float32_bundle: Path, long_text: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed recipe uses the graphs in every step: checks, observing, the sweep, rewriting and writing."""
    loads: Counter[str] = Counter()
    load, load_weights = onnx.load, files.load_external_data_for_model

    def counted(file: BinaryIO, **options: Any) -> onnx.ModelProto:
        loads[Path(file.name).name] += 1
        return load(file, **options)

    def counted_weights(model: onnx.ModelProto, folder: str) -> None:
        loads["weights"] += 1
        load_weights(model, folder)

    monkeypatch.setattr(onnx, "load", counted)
    monkeypatch.setattr(files, "load_external_data_for_model", counted_weights)
    recipe = dataclasses.replace(
        load_recipe("int8"), mixed=MixedRecipe(max_weights_bytes=10**9, by="layer"), memory=MemoryRecipe("int8")
    )
    quantize_bundle(QuantizeOptions(float32_bundle, output, recipe, (long_text,), tokens=1600))
    graphs = [graph.file for graph in read_bundle(float32_bundle).manifest.graphs]
    assert loads == Counter(graphs), "weights are mapped, not loaded into graphs"
