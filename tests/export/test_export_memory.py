"""The peak memory of an export, over what an export of nothing takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

MOST = 2.5  # bytes at the peak per byte of weights
EXPORT = """
import sys
from pathlib import Path
import torch
from titans_export.checkpoints.titans import load, save
from titans_export.exporting import export_loaded
from titans_export.model import MemoryConfig, ModelConfig, Titans

folder, dim, vocabulary = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
attention = {"attention_heads": 2, "window": 32, "persistent": 2}
config = ModelConfig("mac", vocabulary, dim, 4, 2 * dim, MemoryConfig(2, 16, 16), **attention)
torch.manual_seed(0)
save(Titans(config), folder / "checkpoint")
with open("/proc/self/clear_refs", "w") as file:  # the model above does not count
    file.write("5")
export_loaded(load(folder / "checkpoint"), folder / "model.titans", chunks_per_call=1, positions=96)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, (folder / "model.titans" / "weights.safetensors").stat().st_size)
"""


def _peak(folder: Path, dim: int, vocabulary: int) -> tuple[int, int]:
    """Peak memory of the process and size of the weights, in bytes."""
    folder.mkdir()
    command = [sys.executable, "-c", EXPORT, str(folder), str(dim), str(vocabulary)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    peak, weights = map(int, result.stdout.split()[-2:])
    return peak, weights


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_export_takes_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    nothing, _ = _peak(tmp_path / "small", 64, 256)
    peak, weights = _peak(tmp_path / "large", 1024, 4096)
    assert weights > 150e6
    assert peak - nothing < MOST * weights, (peak, nothing, weights)
