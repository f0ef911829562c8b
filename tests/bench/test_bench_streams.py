"""The benchmark of many streams: its workers, its rows and its ratios. Speeds are never asserted."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import plan
from benchmarks import streams as bench
from benchmarks.sizes import SHAPES
from benchmarks.table import fill
from benchmarks.titans_pytorch_model import CHECKED
from titans_export.bench.worker import Worker
from titans_export.bundle import read_bundle
from titans_export.model import MemoryConfig, ModelConfig, Titans

pytest_plugins = ["cli_fixtures"]
TOKENS = np.arange(CHECKED + 3, dtype=np.int32) % 50


def test_all_implementations_agree_and_are_measured(shared_bundle: Path, checkpoint: Path) -> None:
    bundle = read_bundle(shared_bundle)
    subject = bench.Subject("mac", checkpoint, bundle)
    runtimes = bench.implementations(subject, 1, None, compiled=False)

    def pytorch(count: int) -> Worker:
        arguments = (checkpoint, bundle.manifest.model, 1, False, None, None, count)
        return Worker("benchmarks.streams:TorchStreams", *arguments, threads=1)

    makers = {**runtimes, "pytorch": pytorch}
    rows = bench.measure(subject, makers, (1, 3), rounds=1, tokens=(len(TOKENS), 2))
    assert [(row["kind"], row["streams"]) for row in rows] == [("prefill", 1), ("decode", 1), ("decode", 3)]
    for row in rows:
        assert set(row["ratios"]) == {"pytorch", "runtime, exact batches"}
        for entry in row["baselines"].values():
            assert entry["passed"], entry
            assert entry["tokens_per_second"] > 0
    assert set(bench.reach(rows)) == {"decode of 3 / prefill", "decode of 3 / decode of one"}


def test_wrong_outputs_are_found(shared_bundle: Path, checkpoint: Path) -> None:
    bundle = read_bundle(shared_bundle)
    subject = bench.Subject("mac", checkpoint, bundle)
    runtime = bench.implementations(subject, 1, None, compiled=False)["runtime"]
    other = partial(Worker, "bench_doubles:WrongStreams", threads=1)
    rows = bench.measure(
        subject,
        {"runtime": runtime, "wrong": lambda count: other(bundle.manifest.input.width)},
        (2,),
        1,
        (len(TOKENS), 2),
    )
    entries = rows[0]["baselines"]
    assert entries["runtime"]["passed"]
    assert not entries["wrong"]["passed"]


def test_the_plan_on_paper_counts_the_models_parameters() -> None:
    page = plan.PAGE.read_text(encoding="utf-8")
    assert fill(page, {"plan": plan.table()}, plan.PAGE) == page, "run python -m benchmarks.plan"
    shape = SHAPES["20M"]
    memory = MemoryConfig(shape.memory_heads, plan.WIDTH, plan.CHUNK)
    config = ModelConfig(
        "mac",
        shape.vocabulary,
        shape.dim,
        shape.layers,
        shape.hidden,
        memory,
        attention_heads=shape.dim // plan.WIDTH,
        window=plan.WINDOW,
        persistent=plan.PERSISTENT,
    )
    with torch.device("meta"):
        model = Titans(config)
    held = sum(parameter.numel() for parameter in model.parameters()) - model.embedding.numel()
    assert plan.matrix_parameters(shape) == pytest.approx(held, rel=0.02)  # without vectors and initial memories
    one, eight = plan.step(shape, 1), plan.step(shape, 8)
    assert eight.weights == one.weights
    assert eight.states == pytest.approx(8 * one.states)


def test_another_python_runs_the_worker(shared_bundle: Path) -> None:
    environment = (Path(sys.executable), bench.ANY_COMMIT)
    arguments = (str(shared_bundle), 2, {"threads": 1})
    with Worker("bundle_streams:BundleStreams", *arguments, threads=1, environment=environment) as worker:
        outputs = worker.call("outputs", TOKENS)
        assert np.array_equal(outputs[0], outputs[1])
        assert [len(calls) for calls in worker.call("decode", TOKENS[:3], 2)] == [3, 3]
        assert [len(calls) for calls in worker.call("prefill", TOKENS, 2)] == [1, 1]
