"""The operator's function body of standard operators, on ONNX Runtime."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.baselines import Baseline
from benchmarks.onnx_node import Call, Layer, open_model, value
from benchmarks.reference import Answer
from titans_export.model.neural_memory import initial_rows, memory_layout

# Chunks per prefill call. Bodies unroll their chunks, so each count is tried and the fastest is kept.
CHUNKS_PER_CALL = (1, 4)


class OnnxRuntime(Baseline):
    """One node on ONNX Runtime, with all calls bound beforehand. Subclasses choose the node and how its state is
    bound.
    """

    with_body: bool
    in_place: bool
    library: Path | None = None

    def chunks_per_call(self) -> int:
        """Chunks per prefill call."""
        raise NotImplementedError

    def prepare(self) -> dict[str, Any]:
        case = self.case
        self._layout = memory_layout(case.spec)
        rows = initial_rows(case.spec, [torch.from_numpy(layer) for layer in case.data.weights]).numpy()
        self._initial = np.ascontiguousarray(rows)
        count = 1 if self.in_place else 2
        self._states = [value(self._initial) for _ in range(count)]
        self._current = 0
        size = {
            "prefill": self.chunks_per_call() * case.chunk,
            "mac": case.chunk,
            "decode": 1,
        }[case.kind]
        session = self._session(next(self._slices(size)))
        # One list of calls per buffer that may hold the state.
        self._calls = [
            [
                Call(session, inputs, self._states[(start + i) % count], self._states[(start + i + 1) % count])
                for i, inputs in enumerate(self._slices(size))
            ]
            for start in range(count)
        ]
        return {"onnxruntime": onnxruntime.__version__, "tokens_per_call": size}

    def answer(self) -> Answer:
        for state in self._states:
            state.update_inplace(self._initial)
        calls = self._calls[self._current]
        self.run_pass()
        fields = self._layout.unpack(torch.from_numpy(self._states[self._current].numpy()))
        found = {name: field.numpy() for name, field in fields.items() if name[0] in "WS"}
        for name in calls[0].results:
            found[name] = np.concatenate([call.results[name].numpy() for call in calls], 2)
        return found

    def run_pass(self) -> list[int]:
        taken = []
        for call in self._calls[self._current]:
            began = time.perf_counter_ns()
            call()
            taken.append(time.perf_counter_ns() - began)
        self._current = (self._current + len(taken)) % len(self._states)
        return taken

    def state_bytes(self) -> int:
        return self._initial.nbytes * len(self._states)

    def _session(self, inputs: dict[str, NDArray[Any]]) -> onnxruntime.InferenceSession:
        shapes = {"state": self._initial.shape, **{name: x.shape for name, x in inputs.items()}}
        layer = Layer(self.case.spec, self.case.kind != "decode", tuple(shapes.items()))
        return open_model(layer.model(self.with_body), self.case.threads, self.library)

    def _slices(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """The operands of each call of one pass."""
        case = self.case
        for start in range(0, case.tokens, size):
            operands = case.data.operands | ({"context": case.data.context} if case.kind == "mac" else {})
            inputs: dict[str, NDArray[Any]] = {name: x[:, :, start : start + size] for name, x in operands.items()}
            if case.kind == "decode":
                inputs["fill"] = np.full(case.streams, start % case.chunk, np.int64)
            yield inputs


class OnnxRuntimeStandard(OnnxRuntime):
    what = "the operator's function body, standard ONNX operators on ONNX Runtime, two state buffers in turn"
    with_body, in_place = True, False
    _chunks = 1

    def chunks_per_call(self) -> int:
        return self._chunks

    def prepare(self) -> dict[str, Any]:
        if self.case.kind != "prefill":
            return super().prepare()
        tried: dict[int, float] = {}
        for self._chunks in {math.gcd(count, self.case.tokens // self.case.chunk) for count in CHUNKS_PER_CALL}:
            notes = super().prepare()
            tried[self._chunks] = min(sum(calls) for calls in self.run_passes(2))
        fastest = min(tried, key=lambda count: tried[count])
        if self._chunks != fastest:
            self._chunks = fastest
            notes = super().prepare()
        rates = {str(count): round(self.case.tokens * 1e9 / taken) for count, taken in tried.items()}
        return {**notes, "tokens_per_second_by_chunks_a_call": rates}


BASELINE: type[Baseline] = OnnxRuntimeStandard
