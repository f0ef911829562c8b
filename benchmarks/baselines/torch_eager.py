"""The project's mathematics in eager PyTorch: `titans_export.model.memory`, without packed rows or graphs."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Baseline
from benchmarks.reference import Answer
from titans_export.model.memory import (
    CachedChunk,
    Gates,
    State,
    chunk_update,
    chunked,
    coefficients,
    read,
    surprise,
)


class TorchEager(Baseline):
    what = "the same mathematics in PyTorch, eager"

    @torch.inference_mode()
    def prepare(self) -> dict[str, Any]:
        torch.set_num_threads(self.case.threads)
        data = {name: torch.from_numpy(value).clone() for name, value in self.case.data.operands.items()}
        self._tokens = (data["q"], data["k"], data["v"])
        self._gates = Gates(data["step_size"], data["momentum"], data["forget_gate"])
        self._context = torch.from_numpy(self.case.data.context).clone()
        self._at = torch.eye(self.case.chunk, dtype=torch.bool)
        self._state = self._fresh()
        return {"torch": torch.__version__}

    @torch.inference_mode()
    def answer(self) -> Answer:
        self._state = self._fresh()
        self._outputs: dict[str, list[Tensor]] = {"y": [], "read": []}
        self.run_pass()
        found = {name: torch.cat(parts, -2) for name, parts in self._outputs.items() if parts}
        for letter, layers in zip("WS", self._state, strict=True):
            found |= {f"{letter}{i}": value for i, value in enumerate(layers)}
        return {name: value.numpy() for name, value in found.items()}

    @torch.inference_mode()
    def run_pass(self) -> list[int]:
        self._outputs = {"y": [], "read": []}
        return {"prefill": self._prefill, "mac": self._mac, "decode": self._decode}[self.case.kind]()

    def state_bytes(self) -> int:
        w_and_s = sum(value.numel() * value.element_size() for layers in self._state for value in layers)
        if self.case.kind != "decode":
            return w_and_s
        chunk = self._empty_chunk()
        rows = (*chunk.layer_input, *chunk.output_grad, chunk.e, chunk.a)
        return w_and_s + sum(value.numel() * value.element_size() for value in rows)

    def _fresh(self) -> State:
        w = [torch.from_numpy(value).clone() for value in self.case.data.weights]
        return State(w, [torch.zeros_like(value) for value in w])

    def _prefill(self) -> list[int]:
        began = time.perf_counter_ns()
        y, self._state, _ = chunked(self.case.spec, self._state, *self._tokens, self._gates)
        taken = time.perf_counter_ns() - began
        self._outputs["y"].append(y)
        return [taken]

    def _mac(self) -> list[int]:
        spec, taken, size = self.case.spec, [], self.case.chunk
        parts = zip(
            self._context.split(size, -2),
            *(tokens.split(size, -2) for tokens in self._tokens),
            self._gates.chunks(size),
            strict=True,
        )
        for context, q, k, v, gates in parts:
            began = time.perf_counter_ns()
            self._outputs["read"].append(read(spec, self._state.w, context))
            y, self._state, _ = chunk_update(spec, self._state, q, k, v, coefficients(gates))
            taken.append(time.perf_counter_ns() - began)
            self._outputs["y"].append(y)
        return taken

    def _decode(self) -> list[int]:
        spec, taken, chunk = self.case.spec, [], self._empty_chunk()
        parts = (tokens.split(1, -2) for tokens in self._tokens)
        gates = zip(*(gate.unbind(-1) for gate in self._gates.masked()), strict=True)
        for t, (q, k, v, gate) in enumerate(zip(*parts, gates, strict=True)):
            began = time.perf_counter_ns()
            place = t % self.case.chunk
            chunk = chunk.append(self._at[place], surprise(spec, self._state.w, k, v), *gate)
            y = chunk.read(spec, self._state, q)
            if place == self.case.chunk - 1:
                self._state, chunk = chunk.update(self._state), self._empty_chunk()
            taken.append(time.perf_counter_ns() - began)
            self._outputs["y"].append(y)
        return taken

    def _empty_chunk(self) -> CachedChunk:
        lead = (self.case.streams, self.case.heads)
        rows = [[torch.zeros(*lead, self.case.chunk, width) for width in pair] for pair in self.case.spec.shapes]
        left, right = zip(*rows, strict=True)
        zeros, one = torch.zeros(*lead, self.case.chunk), torch.ones(lead)
        return CachedChunk(list(left), list(right), zeros, zeros.clone(), one, torch.zeros(lead), one.clone())


BASELINE: type[Baseline] = TorchEager
