"""The benchmark of a titans-pytorch model: the library as a baseline, stretches, shares, operators, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import table
from benchmarks import titans_pytorch_model as bench
from benchmarks.operator_times import GROUPS, REST, group_of, node_times, profile, schedule, summary
from benchmarks.report import provenance, write
from titans_export.bundle import read_bundle

pytest_plugins = ["cli_fixtures"]
ARGUMENTS: dict[str, Any] = {
    "class": "MemoryAsContextTransformer",
    "num_tokens": 256,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 8,
    "segment_len": 6,
    "num_longterm_mem_tokens": 2,
    # Decoding sees persistent keys at another angle, and takes other weights of the layer before.
    "num_persist_mem_tokens": 0,
    "neural_mem_weight_residual": False,
    "neural_memory_layers": [1, 2],
    "neural_memory_segment_len": 4,
    "sliding_window_attn": True,
    "neural_memory_model": {"type": "MemoryMLP", "dim": 8, "depth": 2, "expansion_factor": 2.0},
    "neural_memory_kwargs": {
        "dim_head": 8,
        "heads": 2,
        "default_step_transform_max_lr": 0.1,
        "use_accelerated_scan": True,
    },
}
LENGTH = 40


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bench.Library:
    pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: make setup")
    folder = tmp_path_factory.mktemp("library")
    (folder / "model.json").write_text(json.dumps(ARGUMENTS))
    bench.make_weights(folder / "model.pt", str(folder / "model.json"))
    return bench.Library(folder / "model.pt", str(folder / "model.json"), 1, LENGTH)


@pytest.fixture()
def tokens() -> Any:
    return np.random.default_rng(0).integers(0, 256, LENGTH, np.int32)


class TestLibrary:
    @pytest.mark.parametrize("prompt", [1, 6, 13, 24])
    def test_decoding_is_its_parallel_forward(self, library: bench.Library, tokens: Any, prompt: int) -> None:
        whole = library.all_logits(tokens, False)
        assert whole.shape == (LENGTH, 256)
        with torch.no_grad():
            right = library._model(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
        assert np.abs(whole - right).max() == 0
        decoded = library.decoded_logits(tokens, prompt)
        assert np.abs(decoded - right[prompt:]).max() < 1e-4
        # Weights that do nothing would pass as well.
        assert np.abs(decoded[1:] - decoded[:-1]).max() > 1e-2

    def test_every_pass_decodes_from_the_prompt(self, library: bench.Library, tokens: Any) -> None:
        library.begin(tokens[:24])
        library.go_back()
        first = library.step(7)
        turn = library.decode(tokens[24:], 2)
        assert [len(taken) for taken in turn] == [LENGTH - 24] * 2
        library.go_back()
        assert np.array_equal(library.step(7), first)
        assert library.state_bytes() > 2 * 2 * 2 * 8 * 8 * 4  # keys and values of a window, and memories beside


class TestStretches:
    def test_of_the_runtime(self, shared_bundle: Path, tokens: Any) -> None:
        bundle = read_bundle(shared_bundle)
        tokens = tokens % bundle.manifest.input.width
        try:
            subject = bench.RuntimeStretches(shared_bundle, 1)
        except Exception as error:
            pytest.skip(f"the kernel is not installed: {error}")
        self._check(subject, tokens)

    def test_of_pytorch(self, shared_bundle: Path, checkpoint: Path, tokens: Any) -> None:
        manifest = read_bundle(shared_bundle).manifest
        tokens = tokens % manifest.input.width
        subject = bench.PyTorchStretches(checkpoint, manifest.model, 1, False, None, None)
        self._check(subject, tokens)
        assert subject.flop_per_token(16) > 0

    @staticmethod
    def _check(subject: bench.Stretches, tokens: Any) -> None:
        whole = subject.all_logits(tokens, False)
        subject.begin(tokens[:24])
        for _ in range(2):
            assert [len(taken) for taken in subject.prefill(tokens[:24], 2)] == [1, 1]
            assert [len(taken) for taken in subject.decode(tokens[24:], 3)] == [16] * 3
            subject.go_back()
            rows = np.stack([subject.step(int(token)) for token in tokens[24:]])
            assert np.abs(rows - whole[24:]).max() < 1e-4


def test_shares_of_limits() -> None:
    limit = {"sgemm_gflops": 100.0, "bandwidth_gb_s": {"2000000": {"read": 40.0}}}
    found = bench.shares({"prefill": 1000.0, "decode": 500.0}, limit, 2_000_000, 5e7)
    assert found == {"prefill": pytest.approx(0.5), "decode": pytest.approx(0.025)}
    assert set(bench.shares({"prefill": 1.0, "decode": 1.0}, limit, 2_000_000, None)) == {"decode"}


class TestOperatorTimes:
    def test_of_known_events(self) -> None:
        def event(operator: str, us: int, name: str = "n_kernel_time", cat: str = "Node") -> dict[str, Any]:
            return {"cat": cat, "name": name, "dur": us, "args": {"op_name": operator}}

        events = [event("MatMul", 5), event("MatMul", 7), event("NeuralMemory", 11), event("If", 100), event("Add", 2)]
        events += [event("MatMul", 50, "n_fence_before"), event("MatMul", 50, cat="Session")]
        found = node_times(events)
        assert found == {"MatMul": (12.0, 2), "NeuralMemory": (11.0, 1), "Add": (2.0, 1)}
        report = summary(found, 2)
        assert (report["us"], report["nodes"]) == (12.5, 2.0)
        assert report["groups_us"] == {
            "matmuls": 6.0, "memory kernel": 5.5, "hyper-connections": 0.0, REST: 1.0
        }  # fmt: skip
        assert report["operators"][0] == {"operator": "MatMul", "group": "matmuls", "us": 6.0, "nodes": 1.0}
        assert group_of("HyperConnection") == "hyper-connections"

    def test_of_a_bundle(self, shared_bundle: Path) -> None:
        bundle = read_bundle(shared_bundle)
        assert sum(g.tokens for n, _ in schedule(bundle, 3, 29) for g in bundle.manifest.graphs if g.name == n)
        found = profile(bundle, 1, 24)
        assert set(found) == {"prefill", "decode"}
        for kind in found.values():
            assert kind["us"] == pytest.approx(sum(kind["groups_us"].values())) and kind["us"] > 0
            assert kind["groups_us"]["memory kernel"] > 0
            assert kind["groups_us"]["matmuls"] > 0
            assert set(kind["groups_us"]) == {*GROUPS, REST}


def test_fills_the_page(tmp_path: Path) -> None:
    assert table.blocks(tmp_path)["titans-pytorch"] == "Not measured yet."
    speed = dict.fromkeys(("tokens_per_second", "slowest_round", "fastest_round", "p50_us", "p90_us", "p99_us"), 1234.5)
    entry = {"what": "", "unavailable": None, "max_abs_error": 2e-6, "state_bytes": 2048, "peak_rss_bytes": 1 << 20}
    times = summary({"MatMul": (60.0, 3), "NeuralMemory": (40.0, 1)}, 1)
    result = {
        "benchmark": "titans-pytorch", "name": "train-mac", "parameters": 5000, "prompt_tokens": 512,
        "decode_tokens": 128, "threads": 2, "others_busy": 0.0, "flop_per_token": 4e7, "weight_bytes_per_token": 4096,
        "limits": {"sgemm_gflops": 200.0, "bandwidth_gb_s": {"4096": {"read": 44.0, "copy": 1.0}}},
        "ratios": {"prefill": {"titans-pytorch": 7.5}, "decode": {"titans-pytorch": 42.0}},
        "baselines": [
            {"name": "runtime", **entry, "prefill": speed, "decode": speed, "notes": {"backend": "onnxruntime"},
             "share_of_limit": {"prefill": 0.5, "decode": 0.25}},
            {"name": "titans-pytorch", **entry, "prefill": speed, "decode": speed, "share_of_limit": {},
             "notes": {"max_abs_error_of_cached_decoding": 0.031}},
            {"name": "pytorch-compile", **entry, "unavailable": "no compiler", "prefill": None, "decode": None,
             "notes": {}, "share_of_limit": {}},
        ],
        "profile": {"prefill": {"tokens": 128, **times}, "decode": {"tokens": 1, **times}},
        **provenance(),
    }  # fmt: skip
    write(tmp_path / "cpu-train-mac.json", result)
    block = table.blocks(tmp_path)["titans-pytorch"]
    for text in (
        "| train-mac | decode | 42.00 |",
        "| decode | runtime | 1,234 | 1,234 to 1,234 |",
        "| 25% | 2e-06 | 2.0 KiB | 1.0 MiB |",
        "max abs error of cached decoding 3.1e-02",
        "- pytorch-compile: no compiler",
        "reads 4.0 KiB of weights, which this machine reads at 44.0 GB/s",
        "a token of prefill takes 40 MFLOP",
        "| prefill | 128 | 4 | 100 | 60 (60%) | 40 (40%) | 0 (0%) | 0 (0%) |",
        "| decode | MatMul | matmuls | 3.0 | 60.0 | 60% |",
    ):
        assert text in block, text
