"""BundleRunner against the same small model in NumPy: any schedule, state, input and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import CACHE, GRAPHS, MEMORY, PERIOD, PERIODIC_GRAPHS, Reference, Weights, write_bundle

from titans_export.bundle import Bundle, read_bundle
from titans_export.running import BundleRunner, open_session

SIZE, COUNT = 12, 29


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.random(vocab=SIZE, outputs=5)


@pytest.fixture(scope="module", params=["tokens", "vectors"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Any:
    """A bundle, its period and inputs."""
    folder = tmp_path_factory.mktemp("bundles") / "small.titans"
    rng = np.random.default_rng(1)
    if request.param == "vectors":
        path = write_bundle(folder, weights, PERIODIC_GRAPHS, period=PERIOD, vectors=True)
        return read_bundle(path), PERIOD, rng.normal(size=(COUNT, SIZE)).astype(np.float32)
    return read_bundle(write_bundle(folder, Weights.random(vocab=SIZE), GRAPHS)), 0, rng.integers(0, SIZE, COUNT)


def model_of(case: Any, weights: Weights) -> Reference:
    return Reference(weights if case[1] else Weights.random(vocab=SIZE), period=case[1])


def outputs(runner: BundleRunner, *args: Any, **options: Any) -> tuple[Any, Any]:
    calls = list(runner.stream(*args, **options))
    return np.concatenate([call.values[runner.output][0] for call in calls]), calls[-1].state


def test_a_stream_is_the_model_s(case: Any, weights: Weights) -> None:
    bundle, _, inputs = case
    reference = model_of(case, weights)
    right = reference.feed(inputs)
    runner = BundleRunner(bundle)
    got, state = outputs(runner, inputs)
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state[CACHE][0], reference.previous, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state[MEMORY][0, 0, :-2], reference.memory.ravel(), rtol=1e-5, atol=1e-5)
    calls = list(runner.stream(inputs))
    assert [call.position for call in calls] == list(np.cumsum([0, *(call.graph.tokens for call in calls[:-1])]))
    assert calls[0].graph.name == "prefill" and {call.graph.name for call in calls} > {"prefill", "decode"}
    assert all(call.graph == runner.next(call.position, COUNT - call.position) for call in calls)


def test_a_stream_goes_on_from_any_state(case: Any, weights: Weights) -> None:
    bundle, _, inputs = case
    right = model_of(case, weights).feed(inputs)
    runner = BundleRunner(bundle)
    for cut in (1, 4, 11):
        _, state = outputs(runner, inputs[:cut])
        before = {name: value.copy() for name, value in state.items()}
        for _ in range(2):  # a state can be used again
            np.testing.assert_allclose(outputs(runner, inputs[cut:], state, cut)[0], right[cut:], rtol=1e-5, atol=1e-5)
        assert all(np.array_equal(state[name], before[name]) for name in before)


def test_a_frozen_memory(case: Any, weights: Weights) -> None:
    bundle, _, inputs = case
    reference = model_of(case, weights)
    reference.learning = False
    right = reference.feed(inputs[:3])
    got, state = outputs(BundleRunner(bundle), inputs[:3], learn=False)
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state[MEMORY], bundle.initial_state()[MEMORY])


def test_shown_values_and_sessions(case: Any) -> None:
    bundle, _, inputs = case
    opened: list[str] = []

    def open_graph(graph: Any) -> Any:
        import onnx

        opened.append(graph.name)
        model = onnx.load(str(bundle.path / graph.file), load_external_data=False)
        model.graph.output.append(onnx.ValueInfoProto(name="rows"))
        return open_session(model, folder=bundle.path)

    runner = BundleRunner(bundle, open_graph, {graph.name: ["rows", "position"] for graph in bundle.manifest.graphs})
    state: Any = None
    for call in runner.stream(inputs):
        np.testing.assert_array_equal(call.values["rows"][None], call.values[runner.output])
        assert call.values["position"].tolist() == [call.position]
        state = call.state
    assert len(opened) == len(set(opened)) >= 2, "each graph opens once"
    assert set(state) == {MEMORY, CACHE}
    feeds = runner.feeds(runner.graphs[0], inputs[: runner.graphs[0].tokens], 8, state, learn=False)
    assert feeds["position"].tolist() == [8] and feeds["learn"].tolist() == [False]


def test_a_call_of_another_length_is_refused(case: Any) -> None:
    bundle: Bundle = case[0]
    runner = BundleRunner(bundle)
    with pytest.raises(AssertionError):
        runner.run(runner.graphs[0], case[2][:1], 0, bundle.initial_state())


def test_the_path_of_a_bundle_does_not_matter(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _, inputs = case
    right, _ = outputs(BundleRunner(bundle), inputs)
    monkeypatch.chdir(bundle.path.parent)
    got, _ = outputs(BundleRunner(read_bundle(Path(bundle.path.name))), inputs)
    np.testing.assert_array_equal(got, right)
