"""Golden data: what they keep, what they find, and what a reader refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import manifest_json
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from titans_export.errors import BundleError
from titans_export.golden import (
    ALL_COLUMNS,
    DRAWN,
    GOLDEN_GRID,
    HIGHEST,
    LEAST_POSITIONS,
    LOWEST,
    SKETCHES,
    Golden,
    GoldenBuilder,
    least_positions,
    periods_of,
    read_golden,
    usual_positions,
    write_golden,
)
from titans_export.manifest import Manifest
from titans_export.model import MemoryConfig, ModelConfig, Titans

WIDTHS = (256, ALL_COLUMNS + 1, 50_257, 152_064)
TOLERANCE = 1e-4


def outputs(size: int, count: int = 64) -> NDArray[np.float64]:
    return np.random.default_rng(size).normal(size=(count, size))


def built(rows: NDArray[Any], block: int = 100, **keys: Any) -> Golden:
    builder = GoldenBuilder(np.arange(len(rows)), rows.shape[1], **keys)
    for at in range(0, len(rows), block):
        builder.add(rows[at : at + block])
    return builder.finish()


@pytest.fixture(scope="module")
def golden() -> dict[int, tuple[NDArray[np.float64], Golden]]:
    rows = {size: outputs(size) for size in WIDTHS}
    return {size: (own, built(own)) for size, own in rows.items()}


@pytest.mark.parametrize("size", WIDTHS)
class TestErrors:
    def test_right_outputs_pass(self, golden: Any, size: int) -> None:
        right, data = golden[size]
        assert 0 < data.errors(right.astype(np.float32), 0).max() < GOLDEN_GRID

    def test_errors_at_the_tolerance_pass(self, golden: Any, size: int) -> None:
        """Whatever the errors, a measured error is at most their largest."""
        right, data = golden[size]
        rng = np.random.default_rng(0)
        for errors in (np.ones(right.shape), rng.choice([-1.0, 1.0], right.shape), rng.uniform(-1, 1, right.shape)):
            assert data.errors(right + TOLERANCE * errors, 0).max() <= TOLERANCE + GOLDEN_GRID

    def test_every_column_counts(self, golden: Any, size: int) -> None:
        """An error in one column alone is found at every position, above a multiple of the tolerance."""
        right, data = golden[size]
        part = -(-size // SKETCHES) if data.sketches is not None else 1
        error = 1.01 * (TOLERANCE + GOLDEN_GRID) * min(part, 8 * part**0.5)
        for column in np.random.default_rng(1).integers(0, size, 8):
            wrong = right.copy()
            wrong[:, column] += error
            assert (data.errors(wrong, 0) > TOLERANCE).all()

    def test_exchanged_columns(self, golden: Any, size: int) -> None:
        right, data = golden[size]
        wrong = right.copy()
        wrong[:, [3, 7]] = right[:, [7, 3]]
        assert data.errors(wrong, 0).max() > 100 * TOLERANCE

    def test_a_shift_of_all_columns(self, golden: Any, size: int) -> None:
        right, data = golden[size]
        assert (data.errors(right + 1.2 * TOLERANCE, 0) > TOLERANCE).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, golden: Any, size: int, value: float) -> None:
        right, data = golden[size]
        wrong = right[:8].astype(np.float32)
        wrong[5, size // 2] = value
        errors = data.errors(wrong, 0)
        assert errors[5] == np.inf and np.isfinite(np.delete(errors, 5)).all()

    def test_blocks_do_not_matter(self, golden: Any, size: int) -> None:
        right, data = golden[size]
        wrong = right + np.random.default_rng(2).normal(size=right.shape)
        parts = [data.errors(wrong[at : at + 37], at) for at in range(0, len(wrong), 37)]
        np.testing.assert_array_equal(np.concatenate(parts), data.errors(wrong, 0))
        again = built(right, block=7)
        for name in ("values", "columns", "sketches", "log_sum_exp"):
            np.testing.assert_array_equal(getattr(again, name), getattr(data, name))


def test_wide_outputs_are_sampled(golden: Any) -> None:
    for size, (right, data) in golden.items():
        assert data.largest == pytest.approx(np.abs(right).max(), abs=GOLDEN_GRID)
        if size <= ALL_COLUMNS:
            assert data.columns is data.sketches is data.log_sum_exp is None
            assert np.abs(data.values - right).max() <= GOLDEN_GRID / 2
            continue
        assert data.columns.shape == data.values.shape == (len(right), HIGHEST + LOWEST + DRAWN)
        assert np.abs(data.values - np.take_along_axis(right, data.columns, 1)).max() <= GOLDEN_GRID / 2
        order = np.argsort(np.round(right / GOLDEN_GRID), 1, kind="stable")
        for row, own in zip(data.columns, order, strict=True):
            assert {*own[:LOWEST], *own[-HIGHEST:]} <= {*row}


def test_vectors_have_no_log_sum_exp() -> None:
    rows = outputs(600)
    builder = GoldenBuilder(np.zeros((len(rows), 3), np.float32), 600, logits=False)
    builder.add(rows)
    data = builder.finish()
    assert data.log_sum_exp is None and data.sketches is not None
    assert data.errors(rows, 0).max() < GOLDEN_GRID


def test_a_long_stream_is_thinned() -> None:
    """Beginning, end and boundaries stay; between them positions are spread over the whole stream."""
    count, period = 40_000, 512
    rows = np.zeros((count, 64))
    rows[:, 0] = np.arange(count) / 4096
    data = built(rows, block=4096, periods=(period,))
    assert 11_000 < len(data.positions) <= (3 << 20) // (64 * 4)
    assert {*range(LEAST_POSITIONS), *range(count - LEAST_POSITIONS, count)} <= {*data.positions}
    boundaries = np.arange(period, count, period)
    assert all(np.isin(boundaries + step, data.positions).all() for step in (-1, 0, 1))
    assert np.diff(data.positions).max() <= 10
    errors = data.errors(rows + 1, 0)
    assert (np.flatnonzero(errors) == data.positions).all()
    np.testing.assert_array_equal(data.errors(rows[5000:5100] + 1, 5000), errors[5000:5100])


def test_many_wide_vectors_are_cut() -> None:
    builder = GoldenBuilder(np.zeros((1024, 4096), np.float32), 8, logits=False, least=300)
    builder.add(np.zeros((1024, 8)))
    assert builder.finish().inputs.shape == (300, 4096)


def model(variant: str, chunk: int, window: int) -> Titans:
    attention = {"attention_heads": 1, "window": window, "persistent": 1} if window else {}
    return Titans(ModelConfig(variant, 16, 8, 1, 8, MemoryConfig(1, 4, chunk), memory_layers=(0,), **attention))


@pytest.mark.parametrize(
    ("variant", "chunk", "window", "periods", "least", "usual"),
    [
        ("lmm", 8, 0, {1, 8}, 256, 1024),
        ("mac", 8, 64, {1, 8, 64}, 256, 1024),
        ("mac", 8, 600, {1, 8, 600}, 1264, 1264),
        ("mag", 8, 2000, {1, 8, 2000}, 4064, 4064),
        ("lmm", 2048, 0, {1, 2048}, 4 * 2048 + 2049, 4 * 2048 + 2049),
    ],
)
def test_streams_cover_boundaries(
    variant: str, chunk: int, window: int, periods: set[int], least: int, usual: int
) -> None:
    own = model(variant, chunk, window)
    graphs = own.graphs(4)
    assert periods_of(own, graphs) == periods
    assert (least_positions(own, graphs), usual_positions(own, graphs)) == (least, usual)


class TestFiles:
    SIZE = 700

    def manifest(self, entry: Any) -> Manifest:
        return Manifest.from_json({**manifest_json(size=self.SIZE), "golden": entry})

    def written(self, folder: Path, count: int = 300, block: int = 100) -> tuple[Golden, Manifest]:
        data = built(outputs(self.SIZE, count), block)
        return data, self.manifest(write_golden(folder, data, ("tokens", "logits"), TOLERANCE).to_json())

    @pytest.mark.parametrize("count", [300, 5000])
    def test_read_as_written(self, tmp_path: Path, count: int) -> None:
        data, manifest = self.written(tmp_path, count)
        assert (manifest.golden.positions is None) == (count == 300)
        assert (tmp_path / "golden.safetensors").stat().st_size < 4e6
        again = read_golden(tmp_path, manifest)
        for name in ("inputs", "positions", "values", "columns", "sketches", "log_sum_exp"):
            np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
        assert (again.size, again.seed) == (data.size, data.seed)

    @pytest.mark.parametrize(
        ("name", "change"),
        {
            "tokens": ("tokens", lambda x: x.astype(np.int64)),
            "logits": ("logits", lambda x: x[:, :5]),
            "columns that are negative": ("golden.columns", lambda x: x - 1000),
            "columns that are too large": ("golden.columns", lambda x: x + 1000),
            "sketches of fewer positions": ("golden.sketches", lambda x: x[1:]),
            "no sketches": ("golden.sketches", lambda x: x[:, :0]),
            "more sketches than columns": ("golden.sketches", lambda x: np.repeat(x, 3, 1)),
            "log-sum-exp": ("golden.log_sum_exp", lambda x: x[None]),
            "positions": ("golden.positions", lambda x: x[::-1].copy()),
        }.values(),
    )
    def test_damaged(self, tmp_path: Path, name: str, change: Any) -> None:
        _, manifest = self.written(tmp_path, 5000)
        tensors = load_file(tmp_path / "golden.safetensors")
        save_file({**tensors, name: change(tensors[name])}, tmp_path / "golden.safetensors")
        with pytest.raises(BundleError, match=r"golden .+ \(TITANS-E0207\)"):
            read_golden(tmp_path, manifest)

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        _, manifest = self.written(tmp_path)
        tensors = load_file(tmp_path / "golden.safetensors")
        del tensors["golden.sketches"]
        save_file(tensors, tmp_path / "golden.safetensors")
        with pytest.raises(BundleError, match="got no tensor"):
            read_golden(tmp_path, manifest)
