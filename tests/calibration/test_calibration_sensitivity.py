"""The mixed sweep against measurements made here: bits, divergence, and that a budget is held with the fewest kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_tools import CALL
from manifests import bundle_of

from titans_calibration.data import Data, DataError, read_data
from titans_calibration.graphs import quantise_graphs
from titans_calibration.observe import Observed
from titans_calibration.options import QuantizeOptions
from titans_calibration.recipe import MixedRecipe, Recipe, RecipeError, WeightsRecipe
from titans_calibration.sensitivity import (
    Mixture,
    _key,
    _Measured,
    choose_mixture,
    mean_bits,
    split_held_back,
)
from titans_calibration.source import open_source
from titans_calibration.writing import write_quantised
from titans_export.bundle import read_bundle

pytest_plugins = ["calibration_fixtures"]
rt = pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
INT4 = Recipe("mine", weights=WeightsRecipe("int4", 32, "minmax"))


@pytest.fixture(scope="module")
def split(float32_bundle: Path, long_text: Path) -> tuple[Data, Data]:
    bundle = read_bundle(float32_bundle)
    return split_held_back(bundle, read_data(bundle, [long_text], 1283, seed=1), 0.2)


def _choose(bundle: Path, data: Data, **mixed: object) -> Mixture:
    recipe = dataclasses.replace(INT4, mixed=MixedRecipe(**mixed))  # type: ignore[arg-type]
    return choose_mixture(open_source(read_bundle(bundle)), recipe, None, data)


def test_ends_are_held_back_in_whole_calls(split: tuple[Data, Data]) -> None:
    first, ends = split
    assert (first.tokens, ends.tokens) == (1283 - 256, 256)
    assert ends.tokens % CALL == 0
    with pytest.raises(DataError, match=f"at least {CALL * 5} tokens"):
        bundle = bundle_of(graphs=[("prefill", CALL, CALL), ("decode", 1, 1)])
        split_held_back(bundle, Data((np.zeros(39, np.int64),), ("a",), 0), 0.2)


def test_bits_are_those_of_pytorch() -> None:
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(n, 11)).astype(np.float32) * 3 for n in (7, 5)]
    tokens = [rng.integers(0, 11, n) for n in (7, 5)]
    losses = [
        torch.nn.functional.cross_entropy(torch.tensor(x[:-1]).double(), torch.tensor(t[1:]), reduction="none")
        for x, t in zip(logits, tokens, strict=True)
    ]
    assert mean_bits(logits, tokens) == pytest.approx(float(torch.cat(losses).mean()) / np.log(2))


def test_the_measured_divergence_is_that_of_the_runtime(
    float32_bundle: Path, split: tuple[Data, Data], tmp_path: Path
) -> None:
    """The bundle with one matmul quantised, run by the runtime, in torch's float64 KL divergence."""
    mixture = _choose(float32_bundle, split[1], max_weights_bytes=10**9)
    bundle = read_bundle(float32_bundle)
    stream = split[1].streams[0]
    for found in (mixture.sensitivities[0], mixture.sensitivities[-1]):
        others = {name: "float32" for s in mixture.sensitivities for name in s.matmuls if s is not found}
        quantised = quantise_graphs(open_source(bundle).models, INT4, None, others)
        options = QuantizeOptions(float32_bundle, tmp_path / "one.titans", INT4, overwrite=True)
        write_quantised(bundle, quantised, options)
        logs = []
        for path in (float32_bundle, tmp_path / "one.titans"):
            with rt.Session(path, threads=1) as session:
                logits = session.stream().feed(stream)
            logs.append(torch.log_softmax(torch.tensor(logits).double(), -1))
        right = torch.nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True) / np.log(2)
        assert found.divergence == pytest.approx(float(right), rel=0.05, abs=1e-8)
        assert found.divergence > 0


def test_a_budget_of_bits_is_held_with_the_fewest(float32_bundle: Path, split: tuple[Data, Data]) -> None:
    everything = _choose(float32_bundle, split[1], max_weights_bytes=10**9)
    assert everything.float32_bits is not None
    assert len(everything.kept) == len(everything.sensitivities)
    assert everything.bits == pytest.approx(everything.float32_bits, rel=1e-6)
    assert _choose(float32_bundle, split[1], max_bits_increase=1000.0).kept == ()
    none = _choose(float32_bundle, split[1], max_bits_increase=1000.0)
    assert none.bits is not None
    whole = (none.bits / everything.float32_bits - 1) * 100
    assert whole > 0
    limit = whole / 4
    mixture = _choose(float32_bundle, split[1], max_bits_increase=limit)
    assert mixture.kept
    assert mixture.bits is not None
    assert (mixture.bits / everything.float32_bits - 1) * 100 <= limit
    assert mixture == _choose(float32_bundle, split[1], max_bits_increase=limit)
    assert set(mixture.formats) == {n for s in mixture.sensitivities[: len(mixture.kept)] for n in s.matmuls}


def test_matmuls_of_a_layer_can_be_decided_together(float32_bundle: Path, split: tuple[Data, Data]) -> None:
    mixture = _choose(float32_bundle, split[1], max_weights_bytes=10**9, by="layer")
    assert {s.name for s in mixture.sensitivities} == {"model.layers.0", "model.head.weight"}
    assert max(len(s.matmuls) for s in mixture.sensitivities) > 4


def test_a_budget_that_nothing_holds_is_told(float32_bundle: Path, split: tuple[Data, Data]) -> None:
    with pytest.raises(RecipeError, match="even with all matmuls in float32"):
        _choose(float32_bundle, split[1], max_bits_increase=-1000.0)
    with pytest.raises(RecipeError, match="max_weights_bytes"):
        _choose(float32_bundle, split[1], max_weights_bytes=1000)


class Stopped(Exception):
    pass


def test_a_sweep_that_was_stopped_goes_on_to_the_same_mixture(
    float32_bundle: Path, split: tuple[Data, Data], tmp_path: Path
) -> None:
    work = tmp_path / "sweep"
    told: list[str] = []

    def choose(stop: str = "") -> Mixture:
        def progress(text: str) -> None:
            told.append(text)
            if stop and stop in text:
                raise Stopped

        told.clear()
        recipe = dataclasses.replace(INT4, mixed=MixedRecipe(max_bits_increase=0.5))
        return choose_mixture(open_source(read_bundle(float32_bundle)), recipe, None, split[1], progress, work)

    with pytest.raises(Stopped):
        choose(stop="alone, 5 of")
    assert not any(name.name != "sweep" for name in tmp_path.iterdir())
    mixture = choose()
    assert told[0] == "4 mixtures were measured before"
    alone = [text for text in told if " alone, " in text]
    assert len(alone) == len(mixture.sensitivities) - 4
    saved = work.read_bytes()
    assert choose() == mixture and work.read_bytes() == saved
    assert not any(" alone, " in text for text in told)
    work.write_bytes(saved[:-9])
    assert choose() == mixture and work.read_bytes() == saved
    for damage in (b"[]", b"null", b'{"key": "k"}', b'{"key": "k", "measured": {"a": 1}}'):
        work.write_bytes(damage)
        assert not _Measured(work, "k").values


def test_a_sweep_of_anything_else_starts_anew(float32_bundle: Path, split: tuple[Data, Data]) -> None:
    bundle, data = read_bundle(float32_bundle), split[1]
    recipe = dataclasses.replace(INT4, mixed=MixedRecipe(max_bits_increase=0.5))
    other = dataclasses.replace(INT4, mixed=MixedRecipe(max_bits_increase=0.6))
    shorter = Data((data.streams[0][:-8],), data.sources, data.seed)
    seen, same, more = ({"a": Observed.empty(4)} for _ in range(3))
    more["a"].add(np.ones((1, 4), np.float32), 0)
    keys = [_key(bundle, r, o, d) for r, o, d in ((recipe, seen, data), (other, seen, data), (recipe, None, data),
                                                   (recipe, more, data), (recipe, seen, shorter))]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert _key(bundle, recipe, same, data) == keys[0]
