"""The command line over checkpoints and bundles of titans-pytorch: tokens in one, vectors in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import invoke, save_model
from safetensors.torch import save_file
from torch import nn

from titans_export.model import MemoryConfig

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: pip install 'titans-export[bench]'")
pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

from library_models import make_memory, make_transformer

HIDDEN: dict[str, Any] = {
    "default_step_transform_max_lr": 0.1,
    "max_grad_norm": None,
    "spectral_norm_surprises": False,
    "store_with_lookahead_value": False,
}
# Chunks and segments of one token, so a single graph: the quickest to export.
MEMORY_CONFIG: dict[str, Any] = HIDDEN | {"chunk_size": 1, "batch_size": None, "qkv_receives_diff_views": False}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "segment_len": 1,
    "neural_memory_segment_len": 1,
    "neural_memory_batch_size": None,
    "sliding_window_attn": True,
    "neural_mem_gate_attn_output": True,
    "neural_memory_kwargs": HIDDEN,
}
EXPORT = ("--format", "titans-pytorch", "--chunks-per-call", 1, "--positions", 40)


def transformer() -> nn.Module:
    """Of bytes, which need no tokenizer."""
    arguments = TRANSFORMER_CONFIG | {"num_tokens": 256, "dim": 8, "depth": 1, "dim_head": 4, "heads": 2}
    arguments |= {"num_residual_streams": 2, "num_persist_mem_tokens": 1}
    memory = arguments.pop("neural_memory_kwargs")
    return make_transformer(0, "mlp-1", dict(memory), **arguments)


def memory() -> nn.Module:
    return make_memory(1, "mlp-1", dim=8, **MEMORY_CONFIG)


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mac.pt and memory.safetensors, each with its .json, and their bundles."""
    made = tmp_path_factory.mktemp("titans-pytorch")
    torch.save({"model": transformer().state_dict(), "step": 3}, made / "mac.pt")
    save_file({name: value.contiguous() for name, value in memory().state_dict().items()}, made / "memory.safetensors")
    write(made / "mac.json", TRANSFORMER_CONFIG)
    write(made / "memory.json", MEMORY_CONFIG)
    for source, kind in ((made / "mac.pt", "titans-pytorch-mac"), (made / "memory.safetensors", "neural-memory")):
        bundle = made / f"{source.stem}.titans"
        result = invoke("export", source, "-o", bundle, *EXPORT, "--config", made / f"{source.stem}.json", "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert (report["variant"], report["bundle"]) == (kind, str(bundle))
        assert report["max_abs_error"] <= report["tolerance"] <= 1e-4
        assert 0 <= report["library_error"] < 1e-5
        assert report["graphs"] == ["decode"]
        assert report["source"] == {
            "files": [source.name], "weights": None, "found": [], "dtypes": ["float32"],
            "library_defaults": {},
        }  # fmt: skip
    return made


@pytest.fixture
def mac(folder: Path) -> Path:
    return folder / "mac.titans"


@pytest.fixture
def vectors(folder: Path) -> Path:
    return folder / "memory.titans"


class TestExport:
    def test_a_training_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        """An EMA copy in half precision, with arguments that only the library's defaults give, and its verification."""
        average = {f"module.{name}": value.bfloat16() for name, value in memory().state_dict().items()}
        source, bundle = tmp_path / "step.pt", tmp_path / "m.titans"
        torch.save({"model": transformer().state_dict(), "model_ema": average, "step": 3}, source)
        config = write(tmp_path / "some.json", {"default_step_transform_max_lr": 0.1, "batch_size": None})
        args = ("--config", config, "--weights", "ema")
        result = invoke("export", source, "-o", bundle, *EXPORT, *args)
        result.check_failure(1, "max_grad_norm", "--library-defaults")
        result = invoke("export", source, "-o", bundle, *EXPORT, *args, "--library-defaults")
        assert result.code == 0, result.err
        assert "neural-memory" in result.out
        assert "maximum difference of PyTorch from the original library" in result.out
        for note in (
            "state dict model_ema is read; --weights NAME takes another of model",
            "prefix module. removed",
            "weights in bfloat16 are converted to float32 exactly",
            "defaults are used for chunk_size = 1, qkv_receives_diff_views = false, max_grad_norm = null, "
            "spectral_norm_surprises = false, store_with_lookahead_value = false",
        ):
            assert note in result.err
        saved = json.loads((bundle / "manifest.json").read_text())["model"]["source"]
        assert (saved["weights"], saved["dtypes"], len(saved["library_defaults"])) == ("model_ema", ["bfloat16"], 5)
        shown = invoke("inspect", bundle).out
        assert (
            "exported from: state dict model_ema; weights saved in bfloat16; library defaults for chunk_size, " in shown
        )
        report = invoke("verify", bundle, "--against", source, "--config", config, "--tokens", 20, "--json")
        assert report.code == 0, report.err
        other = invoke("verify", bundle, "--against", source, "--config", config, "--weights", "model")
        other.check_failure(1, "some.json")

    def test_bug_compatible(self, folder: Path, tmp_path: Path) -> None:
        args = ("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT, "--config", folder / "mac.json")
        result = invoke(*args, "--bug-compatible", 2, "--json")
        assert result.code == 0, result.err
        assert result.json()["library_error"] is None
        manifest = json.loads((tmp_path / "m.titans" / "manifest.json").read_text())
        assert manifest["model"]["config"]["bug_compatible_after"] == 2
        report = invoke("verify", tmp_path / "m.titans", "--against", folder / "mac.pt", "--config",
                        folder / "mac.json", "--tokens", 30, "--json")  # fmt: skip
        assert report.code == 0, report.err

    def test_no_config(self, folder: Path, tmp_path: Path) -> None:
        result = invoke("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT)
        result.check_failure(1, "segment_len", "sliding_window_attn", "spectral_norm_surprises")
        assert not (tmp_path / "m.titans").exists()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"depth": 3}, ("depth", "3")),
            ({"segment_length": 4}, ("segment_length",)),
            ({"sliding_window_attn": 1}, ("sliding_window_attn", "true or false")),
            ({"neural_memory_batch_size": 0}, ("neural_memory_batch_size",)),
            ({"version": "0.4.2"}, ("0.4.2",)),
            ({"class": "NeuralMemory"}, ("NeuralMemory",)),
        ],
    )
    def test_wrong_config(self, change: dict[str, Any], words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
        config = write(tmp_path / "wrong.json", TRANSFORMER_CONFIG | change)
        result = invoke("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT, "--config", config)
        result.check_failure(1, *words)
        assert not (tmp_path / "m.titans").exists()

    def test_config_is_no_file(self, folder: Path, tmp_path: Path) -> None:
        args = ("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT, "--config")
        invoke(*args, tmp_path / "none.json").check_failure(1, "none.json")
        broken = tmp_path / "broken.json"
        broken.write_text("{")
        invoke(*args, broken).check_failure(1, "broken.json")
        invoke(*args, "train_mac").check_failure(1, "train_mac")

    def test_another_config(self, folder: Path, tmp_path: Path) -> None:
        """That of the memory for the transformer."""
        args = ("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT, "--config", folder / "memory.json")
        invoke(*args).check_failure(1, "memory.json")

    def test_bug_compatible_needs_a_prompt(self, folder: Path, tmp_path: Path) -> None:
        args = ("export", folder / "mac.pt", "-o", tmp_path / "m.titans", *EXPORT, "--config", folder / "mac.json")
        invoke(*args, "--bug-compatible", 0).check_failure(2, "--bug-compatible", "0")

    def test_bug_compatible_is_for_transformers(self, folder: Path, tmp_path: Path) -> None:
        source, config = folder / "memory.safetensors", folder / "memory.json"
        args = ("export", source, "-o", tmp_path / "m.titans", *EXPORT, "--config", config, "--bug-compatible", 2)
        invoke(*args).check_failure(2, "--bug-compatible", "NeuralMemory")

    def test_other_formats_have_neither(self, folder: Path, tmp_path: Path) -> None:
        memory = MemoryConfig(heads=1, head_dim=4, chunk=1)
        source = save_model(tmp_path / "lmm", variant="lmm", memory=memory)
        args = ("export", source, "-o", tmp_path / "m.titans")
        invoke(*args, "--config", folder / "mac.json").check_failure(1, "format_version")
        invoke(*args, "--bug-compatible", 2).check_failure(2, "--bug-compatible")
        invoke(*args, "--library-defaults").check_failure(2, "--library-defaults")
        assert not (tmp_path / "m.titans").exists()


@pytest.mark.parametrize("name", ["mac", "memory"])
class TestVerify:
    def test_alone(self, name: str, folder: Path) -> None:
        report = invoke("verify", folder / f"{name}.titans", "--json").json()
        assert report["passed"] is True
        assert report["positions"] == 40
        assert 0 < report["max_abs_error"] <= report["tolerance"]

    def test_against(self, name: str, folder: Path) -> None:
        source = folder / {"mac": "mac.pt", "memory": "memory.safetensors"}[name]
        args = ("verify", folder / f"{name}.titans", "--against", source, "--tokens", 60, "--json")
        result = invoke(*args, "--config", folder / f"{name}.json")
        assert result.code == 0, result.err
        assert result.json()["passed"] is True
        assert result.json()["positions"] == 60
        assert "the weights of" not in result.err
        invoke(*args).check_failure(1, "default_step_transform_max_lr")

    def test_against_other_weights(self, name: str, folder: Path, tmp_path: Path) -> None:
        module = {"mac": transformer, "memory": memory}[name]()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = parameter * 1.1
        for key, value in module.state_dict().items():
            if key.endswith("freqs"):
                value /= 1.1
        torch.save(module.state_dict(), tmp_path / "other.pt")
        config = folder / f"{name}.json"
        args = ("verify", folder / f"{name}.titans", "--against", tmp_path / "other.pt", "--config", config)
        result = invoke(*args, "--tokens", 20)
        result.check_failure(3, "expected")
        assert "the weights of" in result.err


def test_verify_against_what_takes_something_else(folder: Path) -> None:
    args = ("verify", folder / "memory.titans", "--against", folder / "mac.pt", "--config", folder / "mac.json")
    invoke(*args).check_failure(1, "vectors of 8", "a vocabulary of 256")


def test_no_text_for_vectors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    config = folder / "memory.json"
    args = ("verify", folder / "memory.titans", "--against", folder / "memory.safetensors", "--config", config)
    invoke(*args, "--text", tmp_path / "text.txt").check_failure(2, "--text", "vectors")


def test_inspect(mac: Path, vectors: Path) -> None:
    text = invoke("inspect", mac).out
    for word in ("titans-pytorch-mac", "vocabulary 256, tokenizer bytes", "layers.0.memory", "cache"):
        assert word in text
    text = invoke("inspect", vectors).out
    for word in ("neural-memory", "input vectors of 8 floats, output vectors of 8", "memory.memory"):
        assert word in text
    facts = invoke("inspect", vectors, "--json").json()
    assert facts["input"] == {"kind": "vectors", "name": "x", "dtype": "float32", "size": 8}
    assert facts["graphs"][0]["operators"]["ChunkNeuralMemory"] == 1


class TestRun:
    def test_tokens(self, mac: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("The quick brown fox. " * 10)
        args = ("run", mac, "--text", tmp_path / "text.txt", "--prompt", "Once", "--max-tokens", 5, "--json")
        report = invoke(*args).json()
        assert report["bytes"] == report["tokens"] == 210
        assert (report["prompt_tokens"], report["generated_tokens"]) == (4, 5)
        assert report["position"] == 219
        assert report["state_bytes"] == report["state_bytes_at_start"]
        assert invoke(*args).json()["generated"] == report["generated"]

    @pytest.mark.parametrize("how", ["prompt", "text", "stdin"])
    def test_vectors_are_refused(self, how: str, vectors: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("hello")
        args: dict[str, tuple[object, ...]] = {
            "prompt": ("--prompt", "a"),
            "text": ("--text", tmp_path / "text.txt"),
            "stdin": (),
        }
        result = invoke("run", vectors, *args[how], stdin=b"hello")
        result.check_failure(2, "takes vectors", "Stream.feed")
        assert not result.out


def test_bench_of_vectors_is_refused(vectors: Path) -> None:
    invoke("bench", vectors, "--rounds", 1).check_failure(2, "takes vectors")
