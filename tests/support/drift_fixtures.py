"""Two bundles of one model, of which one has its weights rounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import reseal, save_model
from shared_bundles import copy_of

from titans_export.checkpoints import titans
from titans_export.exporting import export_checkpoint
from titans_export.model import MemoryConfig


def write_rounded(source: Path, target: Path, levels: int = 20) -> Path:
    """A bundle whose matrices hold so many steps in each direction: weights in few bits, in the form of float32."""
    shutil.copytree(source, target)
    raw = bytearray((target / "weights.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    for entry in json.loads(raw[8 : 8 + size]).values():
        if len(entry.get("shape", ())) == 2 and entry["dtype"] == "F32":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(raw, np.float32, (end - start) // 4, start)
            step = max(float(np.abs(values).max()), 1e-9) / levels
            values[:] = np.round(values / step) * step
    (target / "weights.safetensors").write_bytes(raw)
    reseal(target)
    return target


@pytest.fixture(scope="session")
def drift_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    memory = MemoryConfig(heads=2, head_dim=8, chunk=4)
    folder = tmp_path_factory.mktemp("checkpoints") / "mac"
    save_model(folder, variant="mac", memory=memory, attention_heads=2, window=8, persistent=2)
    model = titans.load(folder).model
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    titans.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def drift_bundle(drift_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)
    export = partial(export_checkpoint, drift_checkpoint, chunks_per_call=2, positions=32)
    copy = copy_of("drift", export, tmp_path_factory.mktemp("bundles"))
    return copy.rename(copy.with_name("mac.titans"))


@pytest.fixture(scope="session")
def rounded(drift_bundle: Path) -> Path:
    return write_rounded(drift_bundle, drift_bundle.with_name("rounded.titans"))


@pytest.fixture(scope="session")
def base(drift_bundle: Path) -> Iterator[Any]:
    import titans_runtime as rt

    with rt.Session(drift_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="session")
def other(rounded: Path) -> Iterator[Any]:
    import titans_runtime as rt

    with rt.Session(rounded, threads=1) as session:
        yield session
