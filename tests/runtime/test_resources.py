"""What a session costs: memory, dependencies, and what its library exports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import Weights, write_bundle

ROOT = Path(__file__).parents[2]

# A process of its own, so that nothing else counts. RSS includes the pages of the mapped weights that are in memory.
MEASURE = """
import re, sys
import titans_runtime as rt

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

rt.Session(sys.argv[1], threads=1).close()  # libraries and their tables are in now
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
session = rt.Session(sys.argv[2], threads=1)
stream = session.stream()
stream.feed(b"\\1" * 13, outputs="none")  # prefill, chunk and decode
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


def test_three_graphs_hold_a_weight_once(tmp_path: Path) -> None:
    megabyte = 1 << 20
    write_bundle(tmp_path / "small.titans", Weights.random())
    large = write_bundle(tmp_path / "large.titans", Weights.random(ballast=4096))
    assert (large / "weights.safetensors").stat().st_size > 64 * megabyte
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small.titans"), str(large)],
        check=True,
        capture_output=True,
        text=True,
    )
    peak, grown = (int(bytes) / megabyte for bytes in result.stdout.split())
    # The weight once for all three graphs, in the layout of the kernels. Its mapping is given back while it is packed.
    # A second graph packs it once more, finds an equal one, and frees its own. The peak has no bound here: for a weight
    # that is packed within milliseconds it depends on when the thread that gives pages back runs.
    print(f"resident memory grew by {grown:.0f} MB, at its peak by {peak:.0f} MB")
    assert grown < 1.1 * 64 + 16


QUANTISE = """
import sys
from pathlib import Path
import torch
from titans_calibration.options import QuantizeOptions
from titans_calibration.quantize import quantize_bundle
from titans_calibration.recipe import load_recipe
from titans_export.checkpoints.titans import load, save
from titans_export.exporting import export_loaded
from titans_export.model import MemoryConfig, ModelConfig, Titans

folder = Path(sys.argv[1])
config = ModelConfig("mac", 256, 512, 6, 1024, MemoryConfig(2, 16, 16), attention_heads=2, window=32, persistent=2)
torch.manual_seed(0)
save(Titans(config), folder / "checkpoint")
export_loaded(load(folder / "checkpoint"), folder / "float32.titans", chunks_per_call=1, positions=96)
recipe = load_recipe("int8-weight-only")
quantize_bundle(QuantizeOptions(folder / "float32.titans", folder / "int8.titans", recipe))
"""
OPENED = """
import re, sys
import titans_runtime as rt

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

rt.Session(sys.argv[1], threads=1).close()
before = anonymous()
session = rt.Session(sys.argv[2], threads=1)
print(anonymous() - before)
"""


@pytest.mark.long
def test_graphs_of_a_quantised_bundle_share_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", QUANTISE, str(tmp_path)], check=True, cwd=ROOT)
    small = write_bundle(tmp_path / "small.titans", Weights.random())
    code = [sys.executable, "-c", OPENED, str(small), str(tmp_path / "int8.titans")]
    grown = int(subprocess.run(code, check=True, capture_output=True, text=True).stdout)
    weights = (tmp_path / "int8.titans" / "weights.safetensors").stat().st_size
    print(f"{weights / 1e6:.0f} MB of weights, memory grew by {grown / 1e6:.0f} MB")
    # Both graphs make matmuls of packed weights from the same numbers. The rest is the graphs.
    assert weights > 12e6
    assert grown < 1.2 * weights + 12e6


def test_the_package_needs_numpy_alone() -> None:
    code = "import sys, titans_runtime; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


OPEN = "import sys, titans_runtime as rt; rt.Session(sys.argv[1]).stream().feed([1, 2], outputs='none')"
# Notes what a process would send. Local sockets, such as a name service's, do not count.
NETWORK_CALLS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
static void note(const char* call) {
  FILE* file = fopen(getenv("NETWORK_CALLS"), "a");
  fprintf(file, "%s\n", call);
  fclose(file);
}
int getaddrinfo(const char* node, const char* service, const struct addrinfo* hints, struct addrinfo** found) {
  note(node ? node : "getaddrinfo");
  return EAI_FAIL;
}
int connect(int socket, const struct sockaddr* address, socklen_t size) {
  if (address->sa_family != AF_UNIX) note("connect");
  return ((int (*)(int, const struct sockaddr*, socklen_t))dlsym(RTLD_NEXT, "connect"))(socket, address, size);
}
"""


def _without_switch(home: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return env | {"HOME": str(home)} | {name: str(home) for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME")}


@pytest.mark.parametrize("code", [OPEN, "import titans_export.running", "import titans_calibration.instrument"])
def test_nothing_is_written_below_home(code: str, tmp_path: Path) -> None:
    if "runtime" not in code:
        pytest.importorskip("onnxruntime")
    bundle = write_bundle(tmp_path / "m.titans", Weights.random())
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, env=_without_switch(home), cwd=ROOT)
    assert list(home.rglob("*")) == []


@pytest.mark.long
def test_nothing_is_sent(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    source, library, calls = tmp_path / "network.c", tmp_path / "network.so", tmp_path / "calls"
    source.write_text(NETWORK_CALLS)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    bundle = write_bundle(tmp_path / "m.titans", Weights.random())
    env = _without_switch(tmp_path) | {"LD_PRELOAD": str(library), "NETWORK_CALLS": str(calls)}
    probe = "import socket\ntry: socket.create_connection(('localhost', 1))\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", probe], check=True, env=env)
    assert calls.read_text() == "localhost\n"  # the library sees calls
    calls.unlink()
    waiting = OPEN + "; import time; time.sleep(20)"  # events are sent some ten seconds after the start
    subprocess.run([sys.executable, "-c", waiting, str(bundle)], check=True, env=env)
    assert not calls.exists(), calls.read_text()


@pytest.mark.long
@pytest.mark.timeout(1200)  # compiles the runtime
def test_an_install_brings_neither_torch_nor_onnx(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT / "runtime" / "python"], check=True)
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    names = {line.split("==")[0].lower().replace("_", "-") for line in listing.stdout.split()}
    assert names - {"pip", "setuptools"} == {"numpy", "titans-runtime"}
    # What points at a build of the checkout would hide what the wheel lacks.
    env = {name: value for name, value in os.environ.items() if name not in ("TITANS_LIBRARY", "PYTHONPATH")}
    code = "import titans_runtime as rt; print(rt.__version__)"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert f"titans-runtime=={version.stdout.strip()}" in listing.stdout.replace("_", "-")
