"""Whole models that a stream can be measured through, each made inside a worker: a bundle in the runtime, and PyTorch.

All of them have the same methods, so `comparison.py` knows none of them.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .statistics import Turn
from .worker import explain, forget_peak, memory_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.layers import StreamState

# What was fastest: Inductor calls its kernels from C++.
_COMPILE_OPTIONS: dict[str, Any] = {"cpp_wrapper": True}

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]  # (T, vocab)


class Measured:
    """What is measured of a model: `prepare` once, then logits and turns. Subclasses stream."""

    def prepare(self) -> dict[str, Any]:
        """Makes everything that is made once. Returns what there is to say about it, as text or numbers by name."""
        return {}

    def reset(self) -> None:
        """A fresh stream."""
        raise NotImplementedError

    def feed(self, tokens: Tokens) -> Logits:
        """Consumes many tokens at once; the logits after as many of the last ones as cost nothing more."""
        raise NotImplementedError

    def step(self, token: int) -> Logits:
        """Consumes one token; the logits after it, (vocab,)."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """What one stream holds."""
        raise NotImplementedError

    def all_logits(self, tokens: Tokens, one_by_one: bool) -> Logits:
        """The logits after each token of a fresh stream."""
        self.reset()
        return np.stack([self.step(int(token)) for token in tokens]) if one_by_one else self.feed_all(tokens)

    def feed_all(self, tokens: Tokens) -> Logits:
        """Consumes many tokens at once; the logits after each."""
        return self.feed(tokens)

    def start(self) -> None:
        """What is measured begins: with a fresh stream."""
        self.reset()
        forget_peak()

    def prefill(self, tokens: Tokens, passes: int) -> Turn:
        """Nanoseconds of each pass, all tokens fed in one call, after one pass that does not count."""
        taken = []
        for _ in range(1 + passes):
            began = time.perf_counter_ns()
            self.feed(tokens)
            taken.append([time.perf_counter_ns() - began])
        return taken[1:]

    def decode(self, tokens: Tokens, passes: int) -> Turn:
        """Nanoseconds of each token of each pass, after one pass that does not count."""
        for token in tokens:
            self.step(int(token))
        turn = []
        for _ in range(passes):
            taken = []
            for token in tokens:
                began = time.perf_counter_ns()
                self.step(int(token))
                taken.append(time.perf_counter_ns() - began)
            turn.append(taken)
        return turn

    def memory(self) -> dict[str, int]:
        """Bytes of a stream's state, and the most memory that was resident since `start`."""
        return {"state_bytes": self.state_bytes(), "peak_rss_bytes": memory_bytes()[1]}


class Runtime(Measured):
    """A bundle in titans_runtime, its memory nodes run by the kernel or as standard operators."""

    def __init__(self, bundle: Path, device: str, backend: str | None, threads: int, memory_kernel: str) -> None:
        import titans_runtime

        self._session = titans_runtime.Session(
            bundle, device=device, backend=backend, threads=threads, memory_kernel=memory_kernel
        )
        self._stream = self._session.stream()

    def prepare(self) -> dict[str, Any]:
        info = self._session.info
        return {"backend": info["backend"], "memory_kernel": info["memory_kernel"]}

    def reset(self) -> None:
        self._stream.reset()

    def feed(self, tokens: Tokens) -> Logits:
        logits = self._stream.feed(tokens, logits="last")
        assert logits is not None
        return logits

    def feed_all(self, tokens: Tokens) -> Logits:
        logits = self._stream.feed(tokens)
        assert logits is not None
        return logits

    def step(self, token: int) -> Logits:
        return self._stream.step(token)

    def state_bytes(self) -> int:
        return self._stream.state_bytes


class PyTorch(Measured):
    """The checkpoint in PyTorch, eager or with its chunk step and its decode step through torch.compile."""

    def __init__(self, checkpoint: Path, format: str, threads: int, compiled: bool) -> None:
        import torch

        from ..checkpoints import load_checkpoint

        torch.set_num_threads(threads)
        self._model = load_checkpoint(checkpoint, format).model.float()
        self._chunk = self._model.config.memory.chunk
        self._compiled = compiled
        self._steps = {True: self._step, False: self._step}
        self.reset()

    def _step(
        self, tokens: Tensor, position: Tensor, learn: Tensor, state: StreamState, aligned: bool
    ) -> tuple[Tensor, StreamState]:
        from ..model import Step

        logits, following = self._model.step(tokens, state, Step(position, learn, aligned))
        return logits, {name: _packed(value) for name, value in following.items()}

    def prepare(self) -> dict[str, Any]:
        import torch

        notes: dict[str, Any] = {"torch": torch.__version__}
        if not self._compiled:
            return notes
        _decide_branches_on_the_host()
        for name, aligned, length in (("chunk_step", True, self._chunk), ("decode_step", False, self._chunk)):
            began = time.monotonic()
            self.reset()
            self._steps[aligned] = torch.compile(self._step, dynamic=False, fullgraph=True, options=_COMPILE_OPTIONS)
            try:
                # A whole chunk of tokens: the last one folds, which is another graph.
                self._advance(np.zeros(length, np.int32), [length] if aligned else [1] * length)
                notes[name] = f"compiled in {time.monotonic() - began:.1f} s"
            except Exception as error:  # torch.compile has many kinds; whatever it was, the step still runs eagerly
                self._steps[aligned] = self._step
                notes[name] = f"not compiled, runs eagerly: {explain(error)}"
        return notes

    def reset(self) -> None:
        import torch

        # Tensors of the kind that a step returns, else they would be compiled for on their own.
        with torch.inference_mode():
            state = self._model.initial_state(1)
            self._state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        self._position = 0

    def feed(self, tokens: Tokens) -> Logits:
        whole = len(tokens) // self._chunk if self._position % self._chunk == 0 else 0
        return self._advance(tokens, [self._chunk] * whole + [1] * (len(tokens) - whole * self._chunk))

    def step(self, token: int) -> Logits:
        row: Logits = self._advance(np.array([token], np.int32), [1])[0]
        return row

    def state_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._state.values())

    def start(self) -> None:
        super().start()
        # Every change from one kind of step to the other, so that nothing is left to compile.
        once = np.zeros(self._chunk, np.int32)
        for sizes in ([self._chunk], [1] * self._chunk, [self._chunk], [self._chunk]):
            self._advance(once, sizes)

    def prefill(self, tokens: Tokens, passes: int) -> Turn:
        with self._fewest_guards():
            return super().prefill(tokens, passes)

    def decode(self, tokens: Tokens, passes: int) -> Turn:
        with self._fewest_guards():
            return super().decode(tokens, passes)

    def _fewest_guards(self) -> AbstractContextManager[Any]:
        """Compiled code checks only what tells its graphs apart: nothing else changes while it is measured."""
        import torch

        return torch.compiler.set_stance("default", skip_guard_eval_unsafe=True) if self._compiled else nullcontext()

    def _advance(self, tokens: Tokens, sizes: list[int]) -> Logits:
        """Consumes the tokens in calls of the given sizes, each a chunk from a chunk's start or a single token."""
        import torch

        rows, done = [], 0
        with torch.inference_mode():
            learn = torch.ones(1, dtype=torch.bool)
            for size in sizes:
                aligned = size == self._chunk and self._position % self._chunk == 0
                _Host.fills = self._position % self._chunk == self._chunk - 1
                part = torch.from_numpy(tokens[done : done + size].astype(np.int64))[None]
                position = torch.tensor([self._position])
                logits, self._state = self._steps[aligned](part, position, learn, self._state, aligned)
                rows.append(logits[0])
                done += size
                self._position += size
            result: Logits = torch.cat(rows).numpy()
        return result


def _packed(value: Tensor) -> Tensor:
    """The tensor without gaps also along dimensions of one element, which torch.compile tells apart by their stride."""
    import torch

    strides = [math.prod(value.shape[i + 1 :]) for i in range(value.dim())]
    return value if list(value.stride()) == strides else value.clone(memory_format=torch.contiguous_format)


class _Host:
    """What the host knows about the token to come: whether it fills its chunk."""

    fills = False


def _decide_branches_on_the_host() -> None:
    """Lets the host choose whether a chunk is folded, as it knows it from the position.

    The operator asks a tensor, where torch.compile has to break its graph. So it is compiled as two whole graphs, which
    makes it faster than it would be by itself: it is what the runtime is measured against.
    """
    from ..model import operator

    def branch(condition: Tensor, yes: Any, no: Any, *args: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = yes(*args) if _Host.fills else no(*args)
        return result

    operator._branch = branch
