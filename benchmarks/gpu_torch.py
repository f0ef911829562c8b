"""The same mathematics in PyTorch on a device: eager and through torch.compile, with and without one CUDA graph.

Chunked matmuls and cached decoding come from `titans_export.model.memory` and the CPU benchmark's baselines. Each form
is checked against the recurrence before timing.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from titans_export.model.memory import Coefficients, Gates, State, chunk_update, coefficients

# Decode reads rows up to the fill, rounded up to a multiple of this; each multiple compiles one graph.
ROWS_STEP = 16
# Dtypes of matmul operands: float32, float32 rounded to TF32, bfloat16. States and sums are float32.
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Way:
    """How a form runs. mode: a mode of torch.compile, or None for eager. graph: captured once and replayed."""

    name: str
    mode: str | None
    graph: bool


WAYS = (
    Way("torch eager", None, False),
    Way("torch eager, one CUDA graph", None, True),
    Way("torch.compile reduce-overhead", "reduce-overhead", False),
    Way("torch.compile max-autotune, one CUDA graph", "max-autotune-no-cudagraphs", True),
)


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Sets the precision of matmul operands within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    lower = torch.autocast(device, torch.bfloat16) if name == "bfloat16" else contextlib.nullcontext()
    try:
        with lower:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Form(ABC):
    """A case on a device, with streams and heads merged into one dimension N. `run` is a pass that continues in
    place.
    """

    def __init__(self, case: Case, device: str, mode: str | None, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        names = ("q", "k", "v", "step_size", "momentum", "forget_gate")
        self.q, self.k, self.v, *gates = (self._load(case.data.operands[name]) for name in names)
        self.gates = Gates(*gates)
        self.w = [self._load(value) for value in case.data.weights]
        self.s = [torch.zeros_like(value) for value in self.w]
        self.y = torch.empty_like(self.q)
        self._mode = mode

    def reset(self) -> None:
        """Resets to a new memory."""
        for w, s, initial in zip(self.w, self.s, self.case.data.weights, strict=True):
            w.copy_(self._load(initial))
            s.zero_()

    @abstractmethod
    def run(self) -> None:
        """Leaves retrievals in `y`, and the state in `w` and `s`."""

    def answer(self) -> dict[str, Any]:
        """The values of `benchmarks.reference.recurrence`."""
        self.reset()
        self.run()
        lead = (self.case.streams, self.case.heads)
        found = {
            "y": self.y,
            **{f"W{i}": x for i, x in enumerate(self.w)},
            **{f"S{i}": x for i, x in enumerate(self.s)},
        }
        return {name: x.unflatten(0, lead).cpu().numpy() for name, x in found.items()}

    def _load(self, value: Any) -> Tensor:
        return torch.from_numpy(value).flatten(0, 1).to(self.device, self.dtype, copy=True)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._mode is None:
            return function
        made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True, mode=self._mode)
        return made


class Prefill(Form):
    """All chunks of a pass, each as a few batched matmuls."""

    def __init__(self, case: Case, device: str, mode: str | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(case, device, mode, dtype)
        self._chunk = self._compiled(self._update)

    def _update(
        self, w: list[Tensor], s: list[Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Gates
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        y, state, _ = chunk_update(self.case.spec, State(w, s), q, k, v, _exact_coefficients(gates, self.device))
        return y, state.w, state.s

    def run(self) -> None:
        w, s, size = list(self.w), list(self.s), self.case.chunk
        for t in range(0, self.case.tokens, size):
            part = slice(t, t + size)
            gates = Gates(*(gate[:, part] for gate in self.gates[:3]))
            if self._mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
                w, s = [x.clone() for x in w], [x.clone() for x in s]  # the next replay overwrites these
            y, w, s = self._chunk(w, s, self.q[:, part], self.k[:, part], self.v[:, part], gates)
            self.y[:, part] = y
        for own, new in zip([*self.w, *self.s], [*w, *s], strict=True):
            own.copy_(new)


class Decode(Form):
    """One chunk or several, decoded token by token in the cached form, including the chunk updates."""

    def __init__(self, case: Case, device: str, mode: str | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(case, device, mode, dtype)
        count, chunk = case.streams * case.heads, case.chunk
        self._left = [self._zeros(count, chunk, i) for i, _ in case.spec.shapes]
        self._right = [self._zeros(count, chunk, o) for _, o in case.spec.shapes]
        self._e, self._a, self._mfb = self._zeros(count, chunk), self._zeros(count, chunk), self._zeros(3, count)
        self._places = [torch.tensor([place], device=device) for place in range(chunk)]
        self._token = self._compiled(self._one)
        self._close = self._compiled(self._update_chunk)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, place: Tensor, rows: int) -> Tensor:
        theta, eta, alpha = gates.unbind(-1)
        inputs, slopes, z = [k], [], k
        for i, layer in enumerate(self.w):
            z = self._times(inputs[-1], layer)
            if i < len(self.w) - 1:
                gate = torch.sigmoid(z)
                inputs.append(z * gate)
                slopes.append(gate * (1 + z * (1 - gate)))
        errors = [2 * (z - v)]
        for layer, slope in zip(reversed(self.w[1:]), reversed(slopes), strict=True):
            errors.insert(0, self._times(errors[0], layer.transpose(1, 2)) * slope)
        for i, (x, d) in enumerate(zip(inputs, errors, strict=True)):
            self._left[i].index_copy_(1, place, x.to(self.dtype).unsqueeze(1))
            self._right[i].index_copy_(1, place, d.to(self.dtype).unsqueeze(1))
        at, keep = torch.arange(self._e.shape[1], device=self._e.device) == place, 1 - alpha
        self._e.copy_(torch.where(at, theta.unsqueeze(-1), eta.unsqueeze(-1) * self._e))
        self._a.copy_(keep.unsqueeze(-1) * self._a + self._e)
        m, f, beta = self._mfb.unbind(0)
        m = eta * m
        self._mfb.copy_(torch.stack([m, keep * f + m, keep * beta]))
        return self._retrieve(q, rows)

    def _retrieve(self, q: Tensor, rows: int) -> Tensor:
        _, f, beta = (x.unsqueeze(-1) for x in self._mfb.unbind(0))
        h = q
        for i, (w, s) in enumerate(zip(self.w, self.s, strict=True)):
            seen = self._a[:, :rows] * self._times(h, self._left[i][:, :rows].transpose(1, 2))
            z = beta * self._times(h, w) + f * self._times(h, s) - self._times(seen, self._right[i][:, :rows])
            h = F.silu(z) if i < len(self.w) - 1 else z
        return h

    def _times(self, x: Tensor, w: Tensor) -> Tensor:
        """x W for each of N: (N, in), (N, in, out)."""
        return torch.bmm(x.unsqueeze(1), w).squeeze(1)

    def _update_chunk(self) -> None:
        m, f, beta = (x[:, None, None] for x in self._mfb.unbind(0))
        for w, s, x, d in zip(self.w, self.s, self._left, self._right, strict=True):
            x_t = x.transpose(1, 2)
            w_next = beta * w + f * s - x_t @ (self._a.unsqueeze(-1) * d)
            s_next = m * s - x_t @ (self._e.unsqueeze(-1) * d)
            w.copy_(w_next)
            s.copy_(s_next)

    def _open(self) -> None:
        self._e.zero_()
        self._a.zero_()
        self._mfb.zero_()
        self._mfb[0] = self._mfb[2] = 1

    def run(self) -> None:
        chunk = self.case.chunk
        gates = torch.stack(self.gates[:3], -1)
        for t in range(self.case.tokens):
            place = t % chunk
            if place == 0:
                self._open()
            rows = min(chunk, -(-(place + 1) // ROWS_STEP) * ROWS_STEP)
            token = (x[:, t].contiguous() for x in (self.q, self.k, self.v, gates))
            self.y[:, t] = self._token(*token, self._places[place], rows)
            if place == chunk - 1:
                self._close()


class DecodeBySums(Decode):
    """Computes a vector-matrix multiplication as a sum, which Inductor fuses with neighbouring operations."""

    def _times(self, x: Tensor, w: Tensor) -> Tensor:
        return (x.unsqueeze(-1) * w).sum(1)


FORMS: dict[str, tuple[type[Form], ...]] = {"prefill": (Prefill,), "decode": (Decode, DecodeBySums)}


def _exact_coefficients(gates: Gates, device: str) -> Coefficients:
    """The coefficients in float32. They are few, and every result depends on them."""
    with torch.autocast(device, enabled=False):
        return coefficients(gates)
