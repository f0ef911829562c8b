"""Drift of one stream from another: its numbers against NumPy in float64 over whole logits, and what damages it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tolerances import TOLERANCES

from titans_export.bundle import read_bundle
from titans_export.checkpoints import titans
from titans_export.drift import Drift, compare, streams
from titans_export.drift.layers import _Probed, activations, measure_layers
from titans_export.drift.memory import distances
from titans_export.drift.metrics import Meter, ReferenceOutputs, uniform
from titans_export.errors import BundleError, UsageError

pytest_plugins = ["drift_fixtures"]
TOKENS = np.random.default_rng(5).integers(0, 256, 300, np.int32)


class Session:
    """A session of which each stream is what `make` makes of a real one."""

    def __init__(self, real: Any, make: Callable[[Any], Any]) -> None:
        self._real, self._make = real, make

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def stream(self) -> Any:
        return self._make(self._real.stream())


class Stream:
    """A real stream that stops learning at a position, and another whose outputs `change` changes."""

    def __init__(
        self, real: Any, freeze_at: int | None = None, change: Callable[[Any, int], None] | None = None
    ) -> None:
        self._real, self._freeze_at, self._change = real, freeze_at, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def feed(self, tokens: Any) -> Any:
        start = self._real.position
        cut = len(tokens) if self._freeze_at is None else min(len(tokens), max(0, self._freeze_at - start))
        parts = [self._real.feed(tokens[:cut])]
        if cut < len(tokens):
            self._real.freeze()
            parts.append(self._real.feed(tokens[cut:]))
        out = np.concatenate(parts)
        if self._change is not None:
            self._change(out, start)
        return out


def oracle(right: NDArray[Any], got: NDArray[Any], tokens: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """The definitions, over whole logits."""
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (right, got))
    error = np.abs(got.astype(np.float64) - right)
    size = right.shape[1]
    first = [np.log2(size)]
    chosen = np.arange(len(tokens) - 1), tokens[1:]
    return {
        "reference_bits": np.concatenate((first, -np.log2(p[chosen]))),
        "bits": np.concatenate((first, -np.log2(q[chosen]))),
        "kl": (p * np.log2(p / q)).sum(-1),
        "mean_abs_error": error.mean(-1),
        "max_abs_error": error.max(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).astype(float),
        "squares": ((got.astype(np.float64) - right) ** 2).sum(-1),
        "right_squares": (right.astype(np.float64) ** 2).sum(-1),
    }


class TestMetrics:
    def test_against_whole_logits(self, base: Any, other: Any) -> None:
        found = compare(base, {"rounded": other}, TOKENS, window=64).drifts["rounded"]
        wanted = oracle(base.stream().feed(TOKENS), other.stream().feed(TOKENS), TOKENS)
        assert [(window.start, window.end) for window in found.windows] == [
            (0, 64), (64, 128), (128, 192), (192, 256), (256, 300),
        ]  # fmt: skip
        for window in found.windows:
            part = slice(window.start, window.end)
            for name in ("reference_bits", "bits", "mean_abs_error", "top1_agreement"):
                assert getattr(window, name) == pytest.approx(wanted[name][part].mean(), rel=1e-12), name
            assert window.max_abs_error == wanted["max_abs_error"][part].max()
            assert window.kl_mean == pytest.approx(wanted["kl"][part].mean(), rel=1e-9)
            assert window.kl_max == pytest.approx(wanted["kl"][part].max(), rel=1e-9)
            relative = np.sqrt(wanted["squares"][part].sum() / wanted["right_squares"][part].sum())
            assert window.relative_error == pytest.approx(relative, rel=1e-12)
            excess = wanted["bits"][part].mean() / wanted["reference_bits"][part].mean() - 1
            assert window.bits_difference == pytest.approx(excess, rel=1e-9)
        assert found.bits == pytest.approx(wanted["bits"].mean(), rel=1e-12)
        assert found.kl_mean == pytest.approx(wanted["kl"].mean(), rel=1e-9)
        assert found.max_abs_error == wanted["max_abs_error"].max() > 1e-3
        assert found.positions == len(TOKENS)
        assert 0 < (found.top1_agreement or 0) < 1

    def test_of_logits_far_from_zero(self) -> None:
        """No softmax overflows, and one that both shift is no drift."""
        right = np.random.default_rng(0).normal(0, 50, (40, 7)).astype(np.float32)
        tokens = np.arange(40, dtype=np.int32) % 7
        meter = Meter(True, 7, 16, None, None)
        rows = ReferenceOutputs(right + np.float32(4096), True)
        bits, _ = rows.bits(tokens, uniform(7))
        meter.add(right + np.float32(2048), rows, tokens, bits)
        meter.close()
        exact = (right + np.float32(4096)).astype(np.float64) - 4096
        wanted = oracle(exact, (right + np.float32(2048)).astype(np.float64) - 2048, tokens)
        assert meter.drift.reference_bits == pytest.approx(wanted["reference_bits"].mean(), rel=1e-9)
        assert meter.drift.kl_mean == pytest.approx(wanted["kl"].mean(), rel=1e-6)

    def test_against_itself_nothing_drifts(self, base: Any) -> None:
        found = compare(base, {"itself": base}, TOKENS, window=100, tolerance=0, bits_tolerance=0).drifts["itself"]
        assert found.passed and found.max_abs_error == found.mean_abs_error == 0
        assert (found.kl_mean, found.kl_max, found.top1_agreement, found.bits_difference) == (0, 0, 1, 0)
        assert all(entry.weights == entry.surprise == 0 for entry in found.memory) and found.memory

    def test_the_runtime_scores_the_same_bits(self, base: Any, other: Any) -> None:
        found = compare(base, {"rounded": other}, TOKENS).drifts["rounded"]
        for session, bits in ((base, found.reference_bits), (other, found.bits)):
            assert bits == pytest.approx(-float(session.stream().score(TOKENS).mean()) / np.log(2), rel=1e-5)

    def test_blocks_and_windows_change_nothing(self, base: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = compare(base, {"rounded": other}, TOKENS, window=1000).drifts["rounded"]
        assert len(whole.windows) == 1
        for rows, window in ((8, 60), (24, 7), (64, 300)):
            monkeypatch.setattr(streams, "block_length", lambda session, window, rows=rows: rows)
            found = compare(base, {"rounded": other}, TOKENS, window=window).drifts["rounded"]
            assert found.positions == whole.positions
            for name in (
                "bits",
                "reference_bits",
                "kl_mean",
                "kl_max",
                "mean_abs_error",
                "max_abs_error",
                "top1_agreement",
            ):
                assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
            ends = [entry.end for entry in found.windows]
            assert ends == [*range(window, 300, window), 300]
            assert found.memory[-1] == whole.memory[-1]

    def test_many_in_one_pass(self, base: Any, other: Any) -> None:
        together = compare(base, {"rounded": other, "itself": base, "off": other}, TOKENS, window=64).drifts
        alone = compare(base, {"rounded": other}, TOKENS, window=64).drifts["rounded"]
        assert together["rounded"].windows == together["off"].windows == alone.windows
        assert together["itself"].max_abs_error == 0

    def test_fresh_streams(self, base: Any, other: Any) -> None:
        found = compare(base, {"rounded": other}, TOKENS, window=100, stream_length=100).drifts["rounded"]
        for window in found.windows:
            part = TOKENS[window.start : window.end]
            wanted = oracle(base.stream().feed(part), other.stream().feed(part), part)
            assert window.bits == pytest.approx(wanted["bits"].mean(), rel=1e-12)
            assert window.reference_bits == pytest.approx(wanted["reference_bits"].mean(), rel=1e-12)
            assert window.kl_mean == pytest.approx(wanted["kl"].mean(), rel=1e-9)

    def test_no_tokens(self, base: Any) -> None:
        found = compare(base, {"itself": base}, TOKENS[:0], tolerance=0).drifts["itself"]
        assert (found.positions, found.windows, found.passed, found.bits) == (0, [], True, None)


class TestDamage:
    def test_a_memory_that_stops_learning_is_found_where_it_does(self, base: Any) -> None:
        at = 151
        damaged = Session(base, lambda real: Stream(real, freeze_at=at))
        found = compare(base, {"frozen": damaged}, TOKENS, window=50, tolerance=1e-4).drifts["frozen"]
        assert found.first_bad_position == found.first_beyond_tolerance == at
        before = [entry.weights for entry in found.memory if entry.position <= at]
        after = [entry.weights for entry in found.memory if entry.position > at + 4]
        assert before and after
        assert max(before) < 1e-5 < 1e-2 < min(after)

    def test_a_window_s_bits(self, base: Any) -> None:
        """From position 170 on the likeliest token is made less likely: the window from 150 on says so."""

        def flatten(out: Any, start: int) -> None:
            rows = np.arange(start, start + len(out)) >= 170
            out[rows] *= -1

        damaged = Session(base, lambda real: Stream(real, change=flatten))
        text = np.concatenate([base.stream().feed(TOKENS)[:-1].argmax(-1)[:1], TOKENS[1:]])
        found = compare(base, {"flat": damaged}, text, window=50, bits_tolerance=0.5).drifts["flat"]
        worse = [window.start for window in found.windows if (window.bits_difference or 0) > 0.005]
        assert found.first_window_beyond == (worse[0] if worse else None)
        assert all(window.bits_difference == 0 for window in found.windows[:3])
        assert found.windows[3].bits_difference != 0

    def test_smaller_bits_are_no_fault(self, base: Any, other: Any) -> None:
        forth = compare(base, {"x": other}, TOKENS, bits_tolerance=0).drifts["x"]
        back = compare(other, {"x": base}, TOKENS, bits_tolerance=0).drifts["x"]
        assert {forth.passed, back.passed} == {True, False}

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_no_number_is_infinitely_far(self, base: Any, value: float) -> None:
        def spoil(out: Any, start: int) -> None:
            if start <= 70 < start + len(out):
                out[70 - start, 3] = value

        damaged = Session(base, lambda real: Stream(real, change=spoil))
        found = compare(base, {"x": damaged}, TOKENS, window=50, tolerance=1.0, bits_tolerance=1).drifts["x"]
        assert found.max_abs_error == np.inf
        assert found.first_beyond_tolerance == 70
        assert found.first_window_beyond == 50
        assert found.kl_max == np.inf
        assert found.windows[0].max_abs_error == 0


class TestMemory:
    def test_distances(self) -> None:
        random = np.random.default_rng(0)
        fields = {
            name: random.normal(size=shape).astype(np.float32)
            for name, shape in (("a.W0", (1, 2, 3, 4)), ("a.W1", (1, 2, 4, 3)), ("a.gamma", (1, 2, 3)),
                                ("a.S0", (1, 2, 3, 4)), ("a.left0", (1, 2, 5, 3)), ("a.EW0", (1, 2, 3, 4)),
                                ("b.c.W0", (1, 1, 2, 2)))
        }  # fmt: skip
        moved = {name: values + np.float32(0.5) for name, values in fields.items()}
        kinds = {"W": "weights", "g": "weights", "S": "surprise", "E": "rounding_error", "l": "open_chunk"}
        first, second = distances(7, moved, fields, {name: kinds[name.rpartition(".")[2][0]] for name in fields})
        w = np.concatenate([fields[name].ravel() for name in ("a.W0", "a.W1", "a.gamma")]).astype(np.float64)
        s = fields["a.S0"].ravel().astype(np.float64)
        assert (first.layer, first.position, second.layer) == ("a", 7, "b.c")
        assert first.weights == pytest.approx(0.5 * np.sqrt(w.size) / np.linalg.norm(w), rel=1e-6)
        assert first.surprise == pytest.approx(0.5 * np.sqrt(s.size) / np.linalg.norm(s), rel=1e-6)
        assert first.reference_weights_norm == pytest.approx(np.linalg.norm(w), rel=1e-6)
        assert first.weights_norm == pytest.approx(np.linalg.norm(w + 0.5), rel=1e-6)
        assert second.surprise is None

    def test_of_zeros(self) -> None:
        zeros, ones = ({"a.W0": np.full((1, 1, 2, 2), value, np.float32)} for value in (0, 1))
        assert distances(0, zeros, zeros, {"a.W0": "weights"})[0].weights == 0
        assert distances(0, ones, zeros, {"a.W0": "weights"})[0].weights == np.inf

    def test_positions_and_layers(self, base: Any, other: Any) -> None:
        found = compare(base, {"x": other}, TOKENS, window=64).drifts["x"]
        assert [entry.position for entry in found.memory] == sorted(entry.position for entry in found.memory)
        assert found.memory[-1].position == 300
        stream, right = other.stream(), base.stream()
        stream.feed(TOKENS), right.feed(TOKENS)
        a, b = (np.float64(one.memory()["layers.0.memory.W0"]) for one in (stream, right))
        assert found.memory[-1].weights == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-9)


class TestLayers:
    def test_are_the_model_s(self, drift_checkpoint: Path, drift_bundle: Path, rounded: Path) -> None:
        """What is found in the graphs, against what PyTorch's modules are given and give, in float64."""
        model = titans.load(drift_checkpoint).model.eval().double()
        seen: dict[str, list[NDArray[Any]]] = {"layers.0": [], "layers.0.memory": []}
        layer = model.layers[0]
        layer.register_forward_hook(lambda _m, _i, out: seen["layers.0"].append(out[0].numpy()))
        layer.memory.norm.register_forward_pre_hook(lambda _m, given: seen["layers.0.memory"].append(given[0].numpy()))
        tokens = TOKENS[:101]
        with torch.no_grad():
            model.feed(torch.from_numpy(tokens.astype(np.int64))[None], model.initial_state(1), 0)
        found: dict[str, dict[str, list[NDArray[Any]]]] = {}
        for name, path in (("base", drift_bundle), ("rounded", rounded)):
            probed = _Probed(read_bundle(path))
            for call in probed.runner.stream(tokens):
                for key, value in probed.activations(call).items():
                    found.setdefault(key, {}).setdefault(name, []).append(value)
        measured = measure_layers(drift_bundle, {"x": rounded}, tokens)["x"]
        errors, last = ({e.layer: getattr(e, f"relative_error{end}") for e in measured} for end in ("", "_last"))
        assert set(errors) == set(found) == set(seen)
        for key, axis in (("layers.0", 1), ("layers.0.memory", 2)):
            right, base, other = (
                np.concatenate(parts, axis).astype(np.float64)
                for parts in (seen[key], found[key]["base"], found[key]["rounded"])
            )
            assert right.shape == base.shape
            assert np.abs(base - right).max() < TOLERANCES["cpu", "float32"] * max(1, np.abs(right).max())
            assert errors[key] == pytest.approx(np.linalg.norm(other - base) / np.linalg.norm(base), rel=1e-9)
            assert errors[key] > 1e-3
            # Of the last tenth, wherever calls begin.
            base, other = (np.moveaxis(x, axis, 0)[-10:] for x in (base, other))
            assert last[key] == pytest.approx(np.linalg.norm(other - base) / np.linalg.norm(base), rel=1e-9)

    def test_against_itself(self, drift_bundle: Path) -> None:
        assert all(e.relative_error == 0 for e in measure_layers(drift_bundle, {"x": drift_bundle}, TOKENS[:33])["x"])

    def test_of_every_graph(self, drift_bundle: Path) -> None:
        import onnx

        for path in read_bundle(drift_bundle).graph_paths().values():
            assert set(activations(onnx.load(str(path), load_external_data=False))) == {"layers.0", "layers.0.memory"}


class TestRefusals:
    def test_another_vocabulary(self, base: Any) -> None:
        smaller = Session(base, lambda real: real)
        smaller.input_size = smaller.output_size = 99  # type: ignore[attr-defined]
        with pytest.raises(BundleError, match=r"vocabulary of 256.* got a vocabulary of 99"):
            compare(base, {"smaller": smaller}, TOKENS)

    def test_another_tokenizer(self, base: Any) -> None:
        changed = Session(base, lambda real: real)
        changed.info = {**base.info, "tokenizer": {"kind": "none"}}  # type: ignore[attr-defined]
        with pytest.raises(BundleError, match="changed has another tokenizer"):
            compare(base, {"changed": changed}, TOKENS)

    def test_memories_of_other_shapes(self, base: Any) -> None:
        class Smaller(Stream):
            def memory(self) -> dict[str, Any]:
                return {name: values[..., :1] for name, values in self._real.memory().items()}

        with pytest.raises(BundleError, match=r"W0 of smaller has another shape"):
            compare(base, {"smaller": Session(base, Smaller)}, TOKENS[:40])

    def test_tokens_beyond_the_vocabulary(self, base: Any) -> None:
        with pytest.raises(UsageError, match="expected 0 to 255, got 1 to 256"):
            compare(base, {"x": base}, np.array([1, 256], np.int32))


def test_a_drift_of_nothing_passes() -> None:
    assert Drift().passed and Drift().max_abs_error == 0 and Drift().kl_max is None
