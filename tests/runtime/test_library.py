"""The library finds its backends wherever the program goes and under whatever name it was opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import titans_runtime as rt

FOLDER = Path(rt.__file__).parent
OPEN = "import os, sys, titans_runtime as rt; os.chdir('/'); rt.Session(sys.argv[1]).stream().feed([1])"


@pytest.mark.parametrize("how", ["relative", "link"])
def test_backends_are_found(how: str, bundle: Path, tmp_path: Path) -> None:
    if how == "relative":
        folder, library = FOLDER, "./libtitans.so"
    else:
        folder, library = tmp_path, str(tmp_path / "libtitans.so")
        Path(library).symlink_to(FOLDER / "libtitans.so")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(bundle.absolute())],
        cwd=folder,
        env={**os.environ, "TITANS_LIBRARY": library, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
