"""The TensorRT plugin, built for each version with headers and called by a host in place of TensorRT.

TENSORRT_ROOTS, a list with colons between, or TENSORRT_ROOT names the folders that hold include/NvInferRuntime.h.
No test needs a GPU: one library has the CPU kernel in place of the CUDA kernel, another has the CUDA kernel emulated.
With nvcc, the library with the CUDA kernel is also built, for one architecture. Its tests do not run the kernel.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import KINDS, Case, random_cuts, worst
from kernel_runner import Target, run_kernel
from oracles import titans_stream
from safetensors.torch import save_file
from tensorrt_headers import header_roots, header_version
from test_kernel import _calls
from tolerances import TOLERANCES

from titans_export.engines.graphs import with_plugin
from titans_export.exporting import export_checkpoint
from titans_export.model.neural_memory import attributes, initial_rows
from titans_export.onnx.files import load_graph
from titans_export.onnx.nodes import attribute, is_memory

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tensorrt"
PROGRAM = BUILD / "bin" / "tensorrt_plugin_host_cpu"
TARGETS = ["titans_plugin_tests", "titans_plugin_double", "tensorrt_plugin_host_cpu"]
CUDA_TARGETS = ["titans_tensorrt_plugin", "tensorrt_plugin_host"]
ONE_ARCHITECTURE = ["-DTITANS_CUDA=ON", "-DTITANS_CUDA_ARCHITECTURES=80", "-DTITANS_CUDA_PTX=OFF"]
EXPORTS = {"getCreators", "setLoggerFinder"}

pytest_plugins = ["export_fixtures"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Built:
    version: str
    double: Path
    emulated: Path | None  # with the CUDA kernel, emulated
    cuda: Path | None  # with the CUDA kernel

    @property
    def libraries(self) -> list[Path]:
        return [each for each in (self.double, self.emulated, self.cuda) if each]


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# All tests of one version come together, so one folder serves all: the kernels are compiled once.
@pytest.fixture(scope="module", params=header_roots())
def built(request: pytest.FixtureRequest) -> Built:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no cmake or no ninja")
    version = header_version(request.param)
    cuda = shutil.which("nvcc") is not None
    configured = _run(
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), f"-DTENSORRT_ROOT={request.param}",
         "-DCMAKE_BUILD_TYPE=Release", "-DTITANS_BUILD_TESTS=ON", "-DTITANS_WARNINGS_AS_ERRORS=ON",
         *(ONE_ARCHITECTURE if cuda else [])]
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    assert f"TensorRT {version}'s headers" in configured.stdout
    emulated = "no Boost.Context" not in configured.stdout
    targets = [*TARGETS, *(CUDA_TARGETS if cuda else []), *(["titans_plugin_emulated"] if emulated else [])]
    made = _run(["cmake", "--build", str(BUILD), "--target", *targets])
    assert made.returncode == 0, made.stdout + made.stderr
    lib = BUILD / "lib"
    plugin = lib / f"libtitans_tensorrt_plugin_{version.split('.')[0]}.so"
    return Built(
        version,
        lib / "libtitans_plugin_double.so",
        lib / "libtitans_plugin_emulated.so" if emulated else None,
        plugin if cuda else None,
    )


def test_the_host_goes_through_the_plugin(built: Built) -> None:
    environment = {"TITANS_TENSORRT_PLUGIN": str(built.cuda)} if built.cuda else {}
    done = _run([str(BUILD / "tests" / "cpp" / "titans_plugin_tests")], **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"\[  PASSED  \] (\d+) tests", done.stdout)
    assert counted and int(counted[1]) > 0


def test_the_library_shows_two_functions_and_needs_no_tensorrt(built: Built) -> None:
    for library in built.libraries:
        shown = _run(["nm", "-D", "--defined-only", str(library)]).stdout.split("\n")
        extra = {"titans_double"} if library == built.double else set()
        assert {line.split()[-1] for line in shown if line} == EXPORTS | extra
        dynamic = _run(["readelf", "-d", str(library)]).stdout
        assert "NEEDED" in dynamic
        assert not re.search(r"NEEDED.*(nvinfer|cudart)", dynamic)


@dataclass(frozen=True)
class Way:
    alias: str = "undeclared"
    values: str = "float32"
    learn: str = "int64"


WAYS = [
    Way(),
    Way("declared", "float16", "bool"),
    Way("two-buffers", "bfloat16", "int32"),
    Way("two-buffers"),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.alias}-{way.values}-{way.learn}")
@pytest.mark.parametrize("kind", ["linear", "mlp2-silu", "mlp3-gelu-residual-norm"])
@pytest.mark.parametrize("kernel", ["double", "emulated"])
def test_a_stream_in_a_file_equals_the_recurrence(
    built: Built, way: Way, kind: str, kernel: str, tmp_path: Path
) -> None:
    library = built.double if kernel == "double" else built.emulated
    if library is None:
        pytest.skip("no Boost.Context, so no library with the emulated CUDA kernel")
    case = Case(KINDS[kind], 43)
    if case.spec.layer_norm:  # smaller steps than elsewhere: float64 forms drift less than float32 ones
        case.step_size *= 0.1
    values = getattr(torch, way.values)
    # What the plugin gets is what the oracle gets.
    case.q, case.k, case.v = (x.to(values).double() for x in (case.q, case.k, case.v))
    calls = _calls(case, random_cuts(case.length, seed=2))
    for call in calls:
        call["learn"] = torch.ones(case.streams, dtype=torch.bool)
    target = Target("plugin", (str(PROGRAM), "--cpu", "--plugin", str(library)), cuda=kernel == "emulated")
    options = ("--alias", way.alias, "--learn", way.learn)
    rows = initial_rows(case.spec, case.weights)
    result = run_kernel(target, tmp_path, case.spec, rows, calls, options=options, values=values)
    y = torch.cat(result.y, 2).double()
    completed = torch.stack([each[..., 2] for each in result.stats]).sum(0)
    assert completed.eq(case.length // case.spec.chunk_size).all()
    assert result.state.isfinite().all()
    if way.values == "float32":
        tolerance = target.tolerance
    elif kernel == "emulated":
        tolerance = TOLERANCES["cuda-kernel-norm" if case.spec.layer_norm else "cuda-kernel", way.values]
    else:  # the answers alone are rounded, on their way out
        tolerance = target.tolerance + {"float16": 2**-11, "bfloat16": 2**-8}[way.values]
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
            expected, *_ = titans_stream(case.spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
            assert worst((y[b, h], expected)) < tolerance


def test_the_program_says_what_is_wrong(built: Built, tmp_path: Path) -> None:
    program = str(PROGRAM)
    assert _run([program]).returncode == 2
    file = tmp_path / "case.safetensors"
    node = attributes(KINDS["linear"], "read", False)
    save_file({"state": torch.zeros(1, 1, 16), "0.q": torch.zeros(1, 1, 2, 6)}, file,
              metadata={"calls": "1", "attributes": json.dumps(node)})  # fmt: skip
    done = _run([program, "--cpu", str(file), str(tmp_path / "out.bin"), "--plugin", str(built.double)])
    assert done.returncode == 1
    assert re.search(r"\[NeuralMemory\] wrong row size of state: expected \d+, got 16\. Fix: ", done.stderr)


PRELUDE = """
import json
import sys
import numpy as np
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []
    def log(self, severity, message):
        if severity <= trt.Logger.ERROR:
            self.errors.append(message)

def field(name, value):
    # As TensorRT's parser makes them.
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode() + b"\\0", np.int8).copy(), trt.PluginFieldType.CHAR)
    return trt.PluginField(name, np.array(value, np.int32).reshape(-1), trt.PluginFieldType.INT32)

def create(values):
    fields = [field(known.name, values[known.name]) for known in creator.field_names if known.name in values]
    return creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)

def capability(plugin, name):
    return plugin.get_capability_interface(getattr(trt.PluginCapabilityType, name))

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
before = len(registry.all_creators)
registry.load_library(sys.argv[1])
assert len(registry.all_creators) == before + 1
creator = registry.get_creator("NeuralMemory", "1", "ai.titans")
assert creator is not None and creator.interface_info.kind == "PLUGIN CREATOR_V3ONE"
"""

ONE_PLUGIN = """
print("fields", *(known.name for known in creator.field_names))
node = {
    "mode": "update", "schedule": "any", "activation": "silu", "widths": [32, 32], "chunk_size": 32,
    "alias": "declared", "inputs": "state,q,k,v,step_size,momentum,forget_gate,fill", "outputs": "y,state_out",
}
plugin = create(node)
core = capability(plugin, "CORE")
print("plugin", core.plugin_namespace, core.plugin_name, core.plugin_version)
print("outputs", capability(plugin, "BUILD").num_outputs)
print("id", capability(plugin, "BUILD").timing_cache_id)
assert not logger.errors, logger.errors
del node["mode"]
assert create(node) is None
print("error", *logger.errors)
"""

ALL_NODES = """
for node in json.load(open(sys.argv[2])):
    plugin = create(node)
    assert plugin is not None, logger.errors
    print(json.dumps([capability(plugin, "BUILD").num_outputs, capability(plugin, "BUILD").timing_cache_id]))
assert not logger.errors, logger.errors
"""


@pytest.fixture(scope="module")
def registered(built: Built) -> Built:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("no tensorrt_rtx")
    if not built.version.startswith("11."):
        pytest.skip("TensorRT-RTX has the classes of TensorRT 11")
    return built


def _in_registry(library: Path, script: str, *arguments: str) -> str:
    """What the script prints in a process of its own, since the vendor's library may abort."""
    done = _run([sys.executable, "-c", PRELUDE + script, str(library), *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("library", ["double", "cuda"])
def test_tensorrt_rtx_loads_the_library(registered: Built, library: str) -> None:
    path = registered.double if library == "double" else registered.cuda
    if path is None:
        pytest.skip("no nvcc, so no library with the CUDA kernel")
    printed = _in_registry(path, ONE_PLUGIN)
    said = dict(line.split(" ", 1) for line in printed.strip().split("\n"))
    node = attributes(KINDS["linear"], "update", False)
    assert set(said["fields"].split()) == {
        *node,
        "memory_dtype",
        "rounding",
        "seed",
        "alias",
        "inputs",
        "outputs",
    }
    assert said["plugin"] == "ai.titans NeuralMemory 1"
    assert said["outputs"] == "2"
    assert "alias=declared" in said["id"] and "widths=32x32" in said["id"]
    assert said["error"].startswith("[NeuralMemory] missing attribute: mode. Fix: ")


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("exported")
    bundles = [folder / f"{name}.titans" for name in ("mac", "lmm")]
    for bundle in bundles:
        export_checkpoint(checkpoints[bundle.stem], bundle, chunks_per_call=1, positions=100)
    return bundles


@pytest.mark.parametrize("alias", ["declared", "undeclared", "two-buffers"])
def test_every_node_of_an_exported_model_makes_a_plugin(
    registered: Built, exported: list[Path], alias: str, tmp_path: Path
) -> None:
    """What the exporter writes for TensorRT is what the plugin reads."""
    nodes = []
    for bundle in exported:
        manifest = json.loads((bundle / "manifest.json").read_text())
        for graph in manifest["graphs"]:
            model = load_graph(bundle / graph["file"])
            given = with_plugin(model, alias, [entry["input"] for entry in manifest["state"]])
            nodes += [node for node in given.graph.node if is_memory(node)]
    assert {attribute(node, "mode") for node in nodes} == {"update", "read"}
    values = [{entry.name: attribute(node, entry.name) for entry in node.attribute} for node in nodes]
    assert all(each["plugin_namespace"] == "ai.titans" and each["plugin_version"] == "1" for each in values)
    listed = tmp_path / "nodes.json"
    listed.write_text(json.dumps(values))
    printed = _in_registry(registered.double, ALL_NODES, str(listed)).strip().split("\n")
    for node, value, line in zip(nodes, values, printed, strict=True):
        outputs, described = json.loads(line)
        assert outputs == len(node.output)
        assert len(value["inputs"].split(",")) == len(node.input)
        expected = alias if value["mode"] == "update" else "two-buffers"
        assert f"alias={expected} " in described and f"inputs={value['inputs']} " in described


def test_without_headers_the_build_goes_on_and_says_so(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    done = _run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DTENSORRT_ROOT={tmp_path}"])
    assert done.returncode == 0, done.stderr
    assert "Skipping the TensorRT plugin and backend: no NvInferRuntime.h. Pass -DTENSORRT_ROOT=FOLDER" in done.stdout
