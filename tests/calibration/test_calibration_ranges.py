"""Observations against NumPy over all values at once, and clipping limits against brute force over the samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from titans_calibration.observe import BINS, WINDOW, Gram, NotFiniteError, Observed, activation_limit
from titans_calibration.ranges import entropy_limit

Floats = npt.NDArray[np.float32]
LEVELS = 127


def _calls(seed: int = 0, scale: float = 1.0) -> list[Floats]:
    """Heavy tails, channels of different size, growing from call to call so that the histogram has to as well."""
    rng = np.random.default_rng(seed)
    size = np.geomspace(0.1, 4, 16)
    return [(rng.standard_t(4, (1, 96, 16)) * size * scale * 1.3**i).astype(np.float32) for i in range(12)]


def _observe(calls: list[Floats], gram: bool = False) -> Observed:
    observed = Observed.empty(16, gram)
    for number, values in enumerate(calls):
        observed.add(values, number * 96)
    return observed


def test_observations_are_those_of_all_values_at_once() -> None:
    calls = _calls()
    seen = _observe(calls, gram=True)
    rows = np.concatenate(calls, 1)[0].astype(np.float64)
    assert seen.count == len(rows)
    assert (seen.low, seen.high) == (rows.min(), rows.max())
    np.testing.assert_array_equal(seen.channels, np.abs(rows).max(0))
    np.testing.assert_allclose(seen.mean_abs, np.abs(rows).mean(0), rtol=1e-12)
    assert seen.gram is not None
    right = rows.T @ rows
    np.testing.assert_allclose(seen.gram.matrix(), right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    edges = np.linspace(0, seen.limit, BINS + 1)
    np.testing.assert_array_equal(seen.counts, np.histogram(np.abs(rows), edges)[0])
    first = rows[: len(rows) * WINDOW // (12 * 96) // 96 * 96 + 96]
    assert seen.windows[0] == (0, first.min(), first.max())
    assert seen.windows[-1][0] == WINDOW


@pytest.mark.parametrize("channels", [1, 511, 512, 513, 1100])
def test_a_gram_matrix_in_parts_is_the_matrix(channels: int) -> None:
    """Its parts take a quarter of the memory in float64, up to their own width."""
    draw, gram = np.random.default_rng(channels), Gram(channels)
    calls = [draw.integers(-8, 9, (rows, channels)).astype(np.float32) for rows in (5, 1, 64)]
    for rows in calls:
        gram.add(rows)
    whole = np.concatenate(calls).astype(np.float64)
    np.testing.assert_array_equal(gram.matrix(), whole.T @ whole)
    np.testing.assert_array_equal((gram + gram).matrix(), 2 * (whole.T @ whole))
    assert sum(part.nbytes for part in gram.parts) <= 2 * channels * (channels + 512)


def test_the_order_of_merging_changes_nothing() -> None:
    calls = _calls()
    whole = _observe(calls, gram=True)
    parts = Observed.empty(16, True), Observed.empty(16, True)
    for number, values in enumerate(calls):
        parts[number % 3 == 0].add(values, number * 96)
    for merged in (parts[0].merged(parts[1]), parts[1].merged(parts[0])):
        np.testing.assert_array_equal(merged.counts, whole.counts)
        assert (merged.count, merged.low, merged.high, merged.limit) == (
            whole.count,
            whole.low,
            whole.high,
            whole.limit,
        )
        assert merged.windows == whole.windows
        assert merged.gram is not None and whole.gram is not None
        np.testing.assert_allclose(
            merged.gram.matrix(), whole.gram.matrix(), rtol=1e-5, atol=1e-5 * np.abs(whole.gram.matrix()).max()
        )
    with pytest.raises(ValueError, match="different"):
        whole.merged(Observed.empty(8, True))


def test_a_histogram_grows_from_almost_nothing() -> None:
    seen = Observed.empty(1)
    for position, value in enumerate((0.0, 1e-30, 1e-3, 1.0, 3e4)):
        seen.add(np.full((1, 1), value, np.float32), position)
    assert seen.counts.sum() == 5
    assert seen.limit == 32768
    assert seen.counts[0] == 4
    assert seen.counts[int(3e4 / 32768 * BINS)] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(value: float) -> None:
    values = np.ones((2, 5, 4), np.float32)
    values[1, 2, 3] = value
    with pytest.raises(NotFiniteError) as raised:
        Observed.empty(4).add(values, 0)
    assert raised.value.row == 7
    assert np.isnan(raised.value.value) if np.isnan(value) else raised.value.value == value


def test_minmax_and_percentile_are_those_of_the_samples() -> None:
    calls = _calls()
    seen, values = _observe(calls), np.abs(np.concatenate(calls, 1))
    assert activation_limit(seen, "minmax", 99.0, LEVELS) == values.max()
    for percentile in (90.0, 99.0, 99.9):
        found = activation_limit(seen, "percentile", percentile, LEVELS)
        assert abs(found - np.percentile(values, percentile, method="inverted_cdf")) <= seen.limit / BINS


def _squared_error(values: npt.NDArray[np.float64], limit: float, levels: int) -> float:
    step = limit / levels
    return float(np.mean((values - np.clip(np.rint(values / step), 0, levels) * step) ** 2))


@pytest.mark.parametrize("levels", [7, LEVELS])
@pytest.mark.parametrize("seed", range(3))
def test_mse_is_as_good_as_trying_every_limit_on_the_samples(levels: int, seed: int) -> None:
    calls = _calls(seed)
    seen, values = _observe(calls), np.abs(np.concatenate(calls, 1)).astype(np.float64)
    found = activation_limit(seen, "mse", 99.0, levels)
    tried = [_squared_error(values, limit, levels) for limit in np.linspace(0.02, 1, 500) * values.max()]
    assert _squared_error(values, found, levels) <= 1.02 * min(tried)
    assert min(tried) < 0.97 * _squared_error(values, values.max(), levels)  # else clipping would not be worth it here


def _slow_entropy(counts: npt.NDArray[np.int64], width: float, levels: int) -> float:
    """The calibrator's loop as its slides write it, without vectors."""
    bins = counts.astype(float).tolist()
    bins[0] = bins[1]
    last = max(i for i, count in enumerate(bins) if count) + 1
    groups = levels + 1
    best, chosen = float("inf"), last
    for end in range(groups, last + 1):
        reference = bins[:end]
        expanded = [0.0] * end
        for group in range(groups):
            members = [i for i in range(end) if i * groups // end == group]
            filled = [i for i in members if bins[i] > 0]
            for i in filled:
                expanded[i] = sum(bins[j] for j in members) / len(filled)
        reference[-1] += sum(bins[end:])
        if reference[-1] > 0 and expanded[-1] == 0:
            continue
        p, q = np.array(reference) / sum(reference), np.array(expanded) / sum(expanded)
        divergence = float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
        if divergence < best:
            best, chosen = divergence, end
    return min((chosen + 0.5) * width, last * width)


@pytest.mark.parametrize("seed", range(3))
def test_entropy_is_that_of_the_plain_loop(seed: int) -> None:
    values = np.abs(np.random.default_rng(seed).standard_t(3, 4000))
    counts, edges = np.histogram(values, 128, (0, values.max()))
    found = entropy_limit(counts.astype(np.int64), float(edges[-1]), 15)
    assert found == pytest.approx(_slow_entropy(counts, float(edges[1]), 15), rel=1e-9)
    assert found < values.max()


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_limits_of_odd_distributions_are_usable(method: str) -> None:
    zeros, one = Observed.empty(2), Observed.empty(2)
    zeros.add(np.zeros((4, 2), np.float32), 0)
    one.add(np.array([[0, 0], [0, 3]], np.float32), 0)
    assert activation_limit(Observed.empty(2), method, 99.9, LEVELS) == 1.0
    assert activation_limit(zeros, method, 99.9, LEVELS) == 1.0
    assert 0 < activation_limit(one, method, 99.9, LEVELS) <= 3.0
