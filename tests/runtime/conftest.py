from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import Weights, write_bundle

import titans_runtime as rt


@pytest.fixture(scope="session")
def weights() -> Weights:
    return Weights.random()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "leaky.titans", weights)


@pytest.fixture(scope="session")
def session(bundle: Path) -> rt.Session:
    return rt.Session(bundle, threads=1)
