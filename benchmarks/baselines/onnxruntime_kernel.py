"""The operator's kernel registered with ONNX Runtime, as bundles use it."""

from __future__ import annotations

from typing import Any

from benchmarks.baselines import Baseline, unavailable
from benchmarks.baselines.onnxruntime_standard import OnnxRuntime
from benchmarks.onnx_node import find_kernel_library


class OnnxRuntimeKernel(OnnxRuntime):
    what = "our kernel as a custom operator of ONNX Runtime, the state updated in place"
    with_body, in_place = False, True

    def chunks_per_call(self) -> int:
        return self.case.tokens // self.case.chunk

    def prepare(self) -> dict[str, Any]:
        self.library = find_kernel_library()
        if self.library is None:
            raise unavailable("onnxruntime-kernel", "libtitans_onnxruntime_ops.so is missing", "run make setup")
        return super().prepare()


BASELINE: type[Baseline] = OnnxRuntimeKernel
