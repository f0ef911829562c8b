"""The TensorRT headers that tests may build with: folders that hold include/, listed in TENSORRT_ROOTS."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest


def header_version(root: Path) -> str:
    text = (root / "include" / "NvInferVersion.h").read_text()
    parts = [re.search(rf"define (NV_TENSORRT|TRT)_{part}(_ENTERPRISE)? (\d+)", text) for part in ("MAJOR", "MINOR")]
    return ".".join(found[3] for found in parts if found)


def header_roots() -> list[Any]:
    """A parameter for each version; one that is skipped, with the reason, where there is none."""
    listed = os.environ.get("TENSORRT_ROOTS") or os.environ.get("TENSORRT_ROOT") or ""
    missing = pytest.mark.skip(reason="no headers of TensorRT: TENSORRT_ROOTS names no folder")
    roots = [pytest.param(Path(folder), id=header_version(Path(folder))) for folder in listed.split(":") if folder]
    return roots or [pytest.param(None, id="none", marks=missing)]
