"""The operator for CUDA in the library of custom operators: what any machine can tell of it, and what a GPU says."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cases import KINDS, Case, kinds, worst
from onnx import TensorProto, helper
from onnx_ops import LIBRARY, make_case, make_feeds, make_model, make_session
from oracles import titans_stream
from tolerances import TOLERANCES

from titans_export.model.memory import MemorySpec
from titans_export.model.neural_memory import attributes

CUDA = "CUDAExecutionProvider"
needs_gpu = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="no ONNX Runtime with CUDA: a GPU and onnxruntime-gpu"
)


def test_the_library_needs_no_cuda_to_be_loaded() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf to ask what the library needs")
    said = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert needed, said
    assert not [name for name in needed if re.search(r"cuda|nvidia|cudnn|onnxruntime", name)]


def test_the_library_says_what_a_gpu_would_run() -> None:
    library, text = ctypes.CDLL(str(LIBRARY)), ctypes.create_string_buffer(512)
    found = library.titans_onnxruntime_ops_cuda_target(0, text, ctypes.c_size_t(len(text)))
    said = text.value.decode()
    if found:
        assert re.fullmatch(r"cuda-sm\d+", said)
    else:
        assert re.match(r"\[NeuralMemory\] [^.]+\. Fix: .+ \(TITANS-E07\d\d\)", said)


def test_the_library_counts_its_nodes_by_device() -> None:
    def made() -> tuple[int, int]:
        cpu, cuda = ctypes.c_size_t(), ctypes.c_size_t()
        ctypes.CDLL(str(LIBRARY)).titans_onnxruntime_ops_made(ctypes.byref(cpu), ctypes.byref(cuda))
        return cpu.value, cuda.value

    feeds = make_feeds(Case(KINDS["linear"], 8))
    model = make_model(feeds, attributes(KINDS["linear"], "update", False), repeat=3)
    cpu, cuda = made()
    session = make_session(model)
    assert made() == (cpu + 3, cuda)
    session.run(None, feeds)
    assert made() == (cpu + 3, cuda)


@pytest.mark.parametrize("values", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["float16", "bfloat16"])
def test_types_that_only_a_gpu_has_are_refused_on_the_cpu_or_computed_in_float32(values: int) -> None:
    """Where the library knows float16, for CUDA, ONNX Runtime puts casts around a float16 node on the CPU."""
    spec = KINDS["linear"]
    case = Case(spec, 8)
    feeds = make_feeds(case)
    model = make_model(feeds, attributes(spec, "update", False), values=values)
    try:
        session = make_session(model)
    except Exception as error:
        assert "NeuralMemory" in str(error)
        return
    assert values == TensorProto.FLOAT16
    y, _, _ = session.run(None, feeds | {name: feeds[name].astype(np.float16) for name in "qkv"})
    inputs = [x[1, 2] for x in (case.q, case.k, case.v, *case.gates)]
    expected, *_ = titans_stream(spec, [x[1, 2] for x in case.weights], *inputs)
    assert worst((torch.from_numpy(y[1, 2]).double(), expected)) < TOLERANCES["cuda-kernel", "float16"]


@needs_gpu
@kinds
@pytest.mark.parametrize("values", [np.float32, np.float16])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "any"])
def test_a_node_on_a_gpu_computes_the_recurrence(spec: MemorySpec, aligned: bool, values: Any) -> None:
    case = make_case(spec, 16 if aligned else 19)
    feeds = make_feeds(case, aligned)
    feeds |= {name: feeds[name].astype(values) for name in "qkv"}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(values))
    model = make_model(feeds, attributes(spec, "update", aligned), values=kind)
    y, _, _ = make_session(model, provider=CUDA).run(None, feeds)
    name = np.dtype(values).name
    row = "cuda-kernel-norm" if spec.layer_norm and values != np.float32 else "cuda-kernel"
    tolerance = TOLERANCES[row, name]
    for b, h in itertools.product(range(case.streams), range(case.heads)):
        scale = None if case.norm_scale is None else case.norm_scale[h]
        inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
        expected, *_ = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
        assert worst((torch.from_numpy(y[b, h]).double(), expected)) < tolerance


@needs_gpu
def test_what_a_gpu_finds_wrong_is_told_by_the_next_call() -> None:
    spec = KINDS["linear"]
    feeds = make_feeds(Case(spec, 8))
    session = make_session(make_model(feeds, attributes(spec, "update", False)), provider=CUDA)
    y, state, _ = session.run(None, feeds | {"fill": np.array([0, 8])})
    assert np.isnan(y[1]).all()
    assert np.array_equal(state[1], feeds["state"][1])
    assert np.isfinite(y[0]).all()
    with pytest.raises(Exception, match=r"\[NeuralMemory\] .*fill"):
        session.run(None, feeds)
    session.run(None, feeds)
