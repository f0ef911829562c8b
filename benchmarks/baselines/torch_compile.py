"""The same mathematics through torch.compile. Several forms are compiled and the fastest is kept.

All forms have no packed rows, no copies between calls, one graph without breaks, Inductor's C++ wrapper, and only the
guards that select a graph. docs/benchmarks.md lists the other variants that were tried.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Baseline
from benchmarks.case import Case
from benchmarks.reference import Answer
from titans_export.model.memory import Coefficients, Gates, State, chunk_update, coefficients, read

OPTIONS: dict[str, Any] = {"cpp_wrapper": True}
# Each form is timed over this many chunks and trials before one is chosen.
TRIAL_CHUNKS, TRIALS = 16, 5
# Smaller factors count as 0, because such coefficients change no float32 sum.
SMALLEST = 1e-20
# Forms that read rows only up to the fill have one graph per multiple of this.
ROWS_STEP = 16


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles the function as one graph of fixed shapes."""
    made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True, options={**OPTIONS, **options})
    return made


def coefficients_by_logs(gates: Gates) -> Coefficients:
    """As `coefficients`, from differences of summed logarithms: one exponential per entry instead of log2(C)
    multiplications.
    """
    size = gates.momentum.shape[-1]
    sums = torch.stack([gates.momentum, 1 - gates.forget]).clamp_min(SMALLEST).log().cumsum(-1)
    below = torch.ones(size, size, dtype=torch.bool).tril()
    products = torch.where(below, torch.exp(sums.unsqueeze(-1) - sums.unsqueeze(-2)), 0.0)
    (e, b), (m, beta) = products.unbind(0), torch.exp(sums).unbind(0)
    theta = gates.step_size.unsqueeze(-2)
    return Coefficients((b @ e) * theta, e * theta, m, (b @ m.unsqueeze(-1)).squeeze(-1), beta)


class Form(ABC):
    """A way to compute a case, with streams and heads merged into one leading dimension N.

    name: its distinguishing feature. w, s: W and S, per layer (N, in, out).
    """

    name: ClassVar[str]

    def __init__(self, case: Case) -> None:
        self.case = case
        data, spec = case.data, case.spec
        names = ("q", "k", "v", "step_size", "momentum", "forget_gate")
        self.q, self.k, self.v, *gates = (_flat(torch.from_numpy(data.operands[name]).clone()) for name in names)
        self.gates = Gates(*gates)
        self.context = _flat(torch.from_numpy(data.context).clone())
        self.w = [torch.empty(case.streams * case.heads, *shape) for shape in spec.shapes]
        self.s = [torch.empty_like(x) for x in self.w]
        self.reset()

    def reset(self) -> None:
        """Resets to a new memory."""
        for w, s, initial in zip(self.w, self.s, self.case.data.weights, strict=True):
            w.copy_(_flat(torch.from_numpy(initial)))
            s.zero_()

    @abstractmethod
    def run(self, tokens: int) -> tuple[list[int], dict[str, list[Tensor]]]:
        """Processes this many tokens from the current state. Returns the nanoseconds of each call and the parts of each
        output.
        """

    def state(self) -> list[Tensor]:
        """The tensors kept between calls."""
        return [*self.w, *self.s]


class Chunks(Form):
    """Prefill with several chunks per graph. The graph computes their coefficients, so that they stay in cache."""

    chunks: ClassVar[int] = 1

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        count = math.gcd(self.chunks, case.tokens // case.chunk)
        self.size = count * case.chunk
        self.step = compiled(self._step)

    def coefficients(self, gates: Gates) -> Coefficients:
        return coefficients(gates)

    def _step(
        self, w: list[Tensor], s: list[Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Gates
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        spec, state, out = self.case.spec, State(w, s), []
        parts = (x.split(spec.chunk_size, 1) for x in (q, k, v))
        for q_c, k_c, v_c, g_c in zip(*parts, gates.chunks(spec.chunk_size), strict=True):
            y, state, _ = chunk_update(spec, state, q_c, k_c, v_c, self.coefficients(g_c))
            out.append(y)
        return torch.cat(out, 1), state.w, state.s

    def run(self, tokens: int) -> tuple[list[int], dict[str, list[Tensor]]]:
        size, out = self.size, []
        began = time.perf_counter_ns()
        for t in range(0, tokens, size):
            q, k, v = (x[:, t : t + size] for x in (self.q, self.k, self.v))
            gates = Gates(*(x[:, t : t + size] for x in self.gates[:3]))
            y, self.w, self.s = self.step(self.w, self.s, q, k, v, gates)
            out.append(y)
        out = [torch.cat(out, 1)]
        return [time.perf_counter_ns() - began], {"y": out}


class OneChunk(Chunks):
    name = "a graph a chunk"


class SixteenChunks(Chunks):
    name, chunks = "a graph of 16 chunks", 16


class SixteenChunksByLogs(Chunks):
    name, chunks = "a graph of 16 chunks, coefficients by logarithms", 16

    def coefficients(self, gates: Gates) -> Coefficients:
        return coefficients_by_logs(gates)


class ReadAndUpdate(OneChunk):
    """MAC: one graph reads, another updates by one chunk."""

    name = "a graph to read, a graph to update"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.size = case.chunk
        spec = case.spec
        self.read = compiled(lambda w, q: read(spec, w, q))

    def run(self, tokens: int) -> tuple[list[int], dict[str, list[Tensor]]]:
        taken, size = [], self.size
        outputs: dict[str, list[Tensor]] = {"y": [], "read": []}
        for t in range(0, tokens, size):
            context, q, k, v = (x[:, t : t + size] for x in (self.context, self.q, self.k, self.v))
            gates = Gates(*(x[:, t : t + size] for x in self.gates[:3]))
            began = time.perf_counter_ns()
            retrieved = self.read(self.w, context)
            y, self.w, self.s = self.step(self.w, self.s, q, k, v, gates)
            taken.append(time.perf_counter_ns() - began)
            outputs["read"].append(retrieved)
            outputs["y"].append(y)
        return taken, outputs


class ReadAndUpdateByLogs(ReadAndUpdate):
    name = "a graph to read, a graph to update, coefficients by logarithms"

    def coefficients(self, gates: Gates) -> Coefficients:
        return coefficients_by_logs(gates)


class Decode(Form):
    """Decode. A token's operands are two tensors, q, k, v (3, N, D) and the gates (3, N), prepared outside the timed
    part.
    """

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        tokens = torch.stack([self.q, self.k, self.v]).permute(2, 0, 1, 3).contiguous()
        gates = torch.stack(self.gates[:3]).permute(2, 0, 1).contiguous()
        self.operands = [(token.clone(), gate.clone()) for token, gate in zip(tokens, gates, strict=True)]

    def errors(self, w: list[Tensor], k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's input (N, in) and error (N, out) for a token, at weights w."""
        inputs, slopes, z = [k], [], k
        for i, layer in enumerate(w):
            z = _times(inputs[-1], layer)
            if i < len(w) - 1:
                gate = torch.sigmoid(z)
                inputs.append(z * gate)
                slopes.append(gate * (1 + z * (1 - gate)))
        found = [2 * (z - v)]
        for layer, slope in zip(reversed(w[1:]), reversed(slopes), strict=True):
            found.insert(0, _times_transposed(found[0], layer) * slope)
        return list(zip(inputs, found, strict=True))


class Cached(Decode):
    """W and S are constant within a chunk. Rows are written in place, and a full chunk updates W and S in place."""

    name = "cached, all rows of a chunk"
    step: ClassVar[int | None] = None  # rows read: the fill, rounded up to a multiple of this; None: all

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        count, chunk = case.streams * case.heads, case.chunk
        self.left = [torch.zeros(count, chunk, i) for i, _ in case.spec.shapes]
        self.right = [torch.zeros(count, chunk, o) for _, o in case.spec.shapes]
        self.e, self.a, self.mfb = torch.zeros(count, chunk), torch.zeros(count, chunk), torch.zeros(3, count)
        self.mfb[0] = self.mfb[2] = 1
        self.places = [torch.tensor([i]) for i in range(chunk)]
        self.token = compiled(self._token, **self.options)
        self.update_chunk = compiled(self._update_chunk, **self.options)

    def state(self) -> list[Tensor]:
        return [*super().state(), *self.left, *self.right, self.e, self.a, self.mfb]

    def _token(
        self,
        w: list[Tensor],
        s: list[Tensor],
        left: list[Tensor],
        right: list[Tensor],
        e: Tensor,
        a: Tensor,
        mfb: Tensor,
        qkv: Tensor,
        gates: Tensor,
        place: Tensor,
        rows: int,
    ) -> Tensor:
        q, k, v = qkv.unbind(0)
        theta, eta, alpha = gates.unbind(0)
        for i, (x, d) in enumerate(self.errors(w, k, v)):
            left[i].index_copy_(1, place, x.unsqueeze(1))
            right[i].index_copy_(1, place, d.unsqueeze(1))
        at, keep = torch.arange(e.shape[1]) == place, 1 - alpha
        e.copy_(torch.where(at, theta.unsqueeze(-1), eta.unsqueeze(-1) * e))
        a.copy_(keep.unsqueeze(-1) * a + e)
        m, f, beta = mfb.unbind(0)
        m, beta = eta * m, keep * beta
        f = keep * f + m
        mfb.copy_(torch.stack([m, f, beta]))
        h = q
        for i, (w_i, s_i) in enumerate(zip(w, s, strict=True)):
            seen = a[:, :rows] * _times_transposed(h, left[i][:, :rows])
            z = beta.unsqueeze(-1) * _times(h, w_i) + f.unsqueeze(-1) * _times(h, s_i)
            z = z - _times(seen, right[i][:, :rows])
            h = F.silu(z) if i < len(w) - 1 else z
        return h

    def _update_chunk(
        self,
        w: list[Tensor],
        s: list[Tensor],
        left: list[Tensor],
        right: list[Tensor],
        e: Tensor,
        a: Tensor,
        mfb: Tensor,
    ) -> None:
        m, f, beta = (x[:, None, None] for x in mfb.unbind(0))
        for w_i, s_i, x, d in zip(w, s, left, right, strict=True):
            x_t = x.transpose(1, 2)
            w_next = beta * w_i + f * s_i - x_t @ (a.unsqueeze(-1) * d)
            s_next = m * s_i - x_t @ (e.unsqueeze(-1) * d)
            w_i.copy_(w_next)
            s_i.copy_(s_next)
        e.zero_()
        a.zero_()
        mfb.copy_(torch.tensor([1.0, 0.0, 1.0]).unsqueeze(-1).expand_as(mfb))

    def run(self, tokens: int) -> tuple[list[int], dict[str, list[Tensor]]]:
        taken, out, chunk = [], [], self.case.chunk
        held = (self.w, self.s, self.left, self.right, self.e, self.a, self.mfb)
        for t in range(tokens):
            place = t % chunk
            rows = chunk if self.step is None else min(chunk, -(-(place + 1) // self.step) * self.step)
            began = time.perf_counter_ns()
            y = self.token(*held, *self.operands[t], self.places[place], rows)
            if place == chunk - 1:
                self.update_chunk(*held)
            taken.append(time.perf_counter_ns() - began)
            out.append(y.unsqueeze(1))
        return taken, {"y": out}


class CachedRows(Cached):
    name, step = f"cached, rows up to the fill in steps of {ROWS_STEP}", ROWS_STEP


class CachedRowsOneThread(CachedRows):
    """One thread, because waking a second one may cost more than it saves on some ten microseconds of work."""

    name, options = f"{CachedRows.name}, one thread", {"cpp.threads": 1}


class Live(Decode):
    """Every token updates W and S in place; a copy keeps the W of the chunk's start."""

    name = "live, W and S updated by every token"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.start = [x.clone() for x in self.w]
        self.token = compiled(self._token)

    def state(self) -> list[Tensor]:
        return [*super().state(), *self.start]

    def _token(self, start: list[Tensor], w: list[Tensor], s: list[Tensor], qkv: Tensor, gates: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        theta, eta, alpha = (x[:, None, None] for x in gates.unbind(0))
        h = q
        for i, (x, d) in enumerate(self.errors(start, k, v)):
            s_next = eta * s[i] - theta * (x.unsqueeze(-1) * d.unsqueeze(1))
            w_next = (1 - alpha) * w[i] + s_next
            s[i].copy_(s_next)
            w[i].copy_(w_next)
            z = _times(h, w_next)
            h = F.silu(z) if i < len(w) - 1 else z
        return h

    def run(self, tokens: int) -> tuple[list[int], dict[str, list[Tensor]]]:
        taken, out = [], []
        for t in range(tokens):
            began = time.perf_counter_ns()
            if t % self.case.chunk == 0:
                for start, w in zip(self.start, self.w, strict=True):
                    start.copy_(w)
            y = self.token(self.start, self.w, self.s, *self.operands[t])
            taken.append(time.perf_counter_ns() - began)
            out.append(y.unsqueeze(1))
        return taken, {"y": out}


FORMS: dict[str, tuple[type[Form], ...]] = {
    "prefill": (OneChunk, SixteenChunks, SixteenChunksByLogs),
    "mac": (ReadAndUpdate, ReadAndUpdateByLogs),
    "decode": (Cached, CachedRows, CachedRowsOneThread, Live),
}


class TorchCompile(Baseline):
    what = "the same mathematics through torch.compile, the fastest of several forms"

    @torch.inference_mode()
    def prepare(self) -> dict[str, Any]:
        torch.set_num_threads(self.case.threads)
        # One function is compiled for every number of rows.
        torch._dynamo.config.recompile_limit = max(64, self.case.chunk)
        best, seconds, tried = math.inf, 0.0, {}
        for kind in FORMS[self.case.kind]:
            began = time.monotonic()
            form = kind(self.case)
            tokens = min(self.case.tokens, TRIAL_CHUNKS * self.case.chunk)
            form.run(tokens)
            seconds += time.monotonic() - began
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                taken = min(sum(form.run(tokens)[0]) for _ in range(TRIALS))
            tried[kind.name] = round(tokens * 1e9 / taken)
            if taken < best:
                best, self._form = taken, form
        return {
            "torch": torch.__version__,
            "form": self._form.name,
            "tokens_per_second_tried": tried,
            "compile_s": round(seconds, 1),
        }

    @torch.inference_mode()
    def answer(self) -> Answer:
        self._form.reset()
        _, outputs = self._form.run(self.case.tokens)
        found = {name: torch.cat(parts, 1) for name, parts in outputs.items()}
        found |= {f"W{i}": x for i, x in enumerate(self._form.w)} | {f"S{i}": x for i, x in enumerate(self._form.s)}
        lead = (self.case.streams, self.case.heads)
        return {name: x.unflatten(0, lead).numpy() for name, x in found.items()}

    @torch.inference_mode()
    def run_pass(self) -> list[int]:
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            return self._form.run(self.case.tokens)[0]

    def state_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._form.state())


def _flat(x: Tensor) -> Tensor:
    """(B, H, ...) to (B H, ...)."""
    return x.flatten(0, 1)


def _times(x: Tensor, w: Tensor) -> Tensor:
    """x W for each of N: (N, in), (N, in, out). Written as a sum, which Inductor fuses with neighbouring operations."""
    return (x.unsqueeze(-1) * w).sum(1)


def _times_transposed(x: Tensor, w: Tensor) -> Tensor:
    """x W^T for each of N: (N, out), (N, in, out)."""
    return (w * x.unsqueeze(1)).sum(-1)


BASELINE: type[Baseline] = TorchCompile
