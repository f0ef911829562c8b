"""How far a bundle may be from the right outputs: what float32 itself cannot do, no bundle has to, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from library_models import memory

from titans_export import exporting
from titans_export.bundle import read_bundle
from titans_export.checkpoints.titans_pytorch import from_live
from titans_export.errors import MismatchError
from titans_export.exporting import export_loaded
from titans_export.model import StreamModel
from titans_export.reference import TOLERANCE, tolerance_of
from titans_export.stability import RunningError

pytest.importorskip("titans_pytorch")


@pytest.fixture(scope="module")
def vectors() -> StreamModel:
    return from_live(memory()).model


class TestRule:
    def test_a_stable_model_has_the_usual_one(self, vectors: StreamModel) -> None:
        assert tolerance_of(vectors, np.array([[-3.0, 2.0]]), 2e-6) == TOLERANCE

    def test_where_float32_is_worse_it_is_four_times_as_far_rounded_up(self, vectors: StreamModel) -> None:
        assert tolerance_of(vectors, np.array([[8.0]]), 3.1e-4) == pytest.approx(2e-3)
        assert tolerance_of(vectors, np.array([[8.0]]), 2.5e-4) == pytest.approx(1e-3)

    def test_small_vectors_are_compared_relatively(self, vectors: StreamModel) -> None:
        assert tolerance_of(vectors, np.array([[2e-3]]), 0.0) == pytest.approx(2e-7)

    @pytest.mark.parametrize("error", [0.1, np.inf, np.nan])
    def test_what_float32_does_not_compute_is_refused(self, vectors: StreamModel, error: float) -> None:
        with pytest.raises(MismatchError, match="float32"):
            tolerance_of(vectors, np.array([[8.0]]), error)


def test_a_bundle_farther_than_that_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    checkpoint = from_live(memory())
    off = 0.0

    class Off(RunningError):
        def add(self, outputs: npt.NDArray[Any]) -> None:
            super().add(outputs + np.float32(off))

    monkeypatch.setattr(exporting, "RunningError", Off)
    output = tmp_path / "m.titans"
    off = 1e-3
    with pytest.raises(MismatchError, match="first beyond its limit at position"):
        export_loaded(checkpoint, output, chunks_per_call=1, positions=40)
    assert not output.exists()
    off = 1e-5
    report = export_loaded(checkpoint, output, chunks_per_call=1, positions=40)
    assert report.max_abs_error == pytest.approx(1e-5, rel=0.2)
    manifest = json.loads((output / "manifest.json").read_text())
    assert read_bundle(output).tolerance == report.tolerance == manifest["golden"]["tolerance"]


def test_float32_that_rounds_luckily_sets_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What rounding explains is measured once a bundle errs by more than PyTorch's own run in float32."""
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    checkpoint = replace(from_live(memory()), oracle=None)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.mul_(8.0)  # outputs of up to 700
    monkeypatch.setattr(exporting, "model_error", lambda model, inputs, *rest: np.zeros(inputs.shape[1]))
    report = export_loaded(checkpoint, tmp_path / "m.titans", chunks_per_call=1, positions=40)
    assert TOLERANCE < report.max_abs_error <= report.tolerance < 1e-2
    assert report.tolerance == read_bundle(tmp_path / "m.titans").tolerance

    class Off(RunningError):
        def add(self, outputs: npt.NDArray[Any]) -> None:
            super().add(outputs + np.float32(0.02))

    monkeypatch.setattr(exporting, "RunningError", Off)
    with pytest.raises(MismatchError, match="first beyond its limit at position"):
        export_loaded(checkpoint, tmp_path / "other.titans", chunks_per_call=1, positions=40)


def test_a_library_that_disagrees_stops_the_export(tmp_path: Path) -> None:
    checkpoint = from_live(memory())
    with torch.no_grad():
        next(checkpoint.model.parameters()).mul_(1.5)
    with pytest.raises(MismatchError, match="the library that trained the checkpoint"):
        export_loaded(checkpoint, tmp_path / "m.titans", chunks_per_call=1, positions=40)
