"""HyperConnection nodes in a bundle's graphs: on the kernel where its library is, as function bodies elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hyper_nodes import MORE_THAN_THE_KERNEL_TAKES, add_connections
from test_in_place import TOKENS, TOLERANCE, open_with_kernel
from test_memory_kernel import FOLDER

import titans_runtime as rt

pytest_plugins = ["export_fixtures"]


def copy(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "connected.titans"))


@pytest.mark.parametrize("variant", ["mac", "lmm"])
@pytest.mark.parametrize("choice", ["require", "off", "no library"])
def test_they_run_with_and_without_the_kernel(
    bundles: dict[str, Path], tmp_path: Path, variant: str, choice: str
) -> None:
    path = add_connections(copy(bundles[variant], tmp_path))
    options: dict[str, object] = {"memory_kernel": choice}
    if choice == "require":
        open_with_kernel(path).close()
    if choice == "no library":
        shutil.copy(FOLDER / "libtitans_backend_onnxruntime.so", tmp_path)
        options = {"plugin_dir": tmp_path}
    plain_options = {"memory_kernel": "off"} if choice == "no library" else options
    with (
        rt.Session(bundles[variant], threads=1, **plain_options) as plain,
        rt.Session(path, threads=1, **options) as connected,
    ):
        expected, found = plain.stream().feed(TOKENS), connected.stream().feed(TOKENS)
        assert [s["in_place"] for s in connected.info["state"]] == [s["in_place"] for s in plain.info["state"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_they_run_on_the_kernel(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Told by what it refuses."""
    open_with_kernel(bundles["lmm"]).close()
    path = add_connections(copy(bundles["lmm"], tmp_path), MORE_THAN_THE_KERNEL_TAKES)
    with pytest.raises(rt.Error, match=r"\[HyperConnection\] invalid attribute iterations: expected \[1, 1000\]"):
        rt.Session(path, threads=1, memory_kernel="require")
    rt.Session(path, threads=1, memory_kernel="off").close()
