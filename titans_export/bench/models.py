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

from ..schedule import calls, may_start
from .statistics import Passes
from .worker import explain, forget_peak, memory_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..manifest import Model
    from ..model import Graph
    from ..model.layers import StreamState

# What was fastest: Inductor calls its kernels from C++.
_COMPILE_OPTIONS: dict[str, Any] = {"cpp_wrapper": True}

# Beyond it no schedule has a place that it did not have before.
_MOST_POSITIONS = 4096

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]  # (T, vocab)


class Measured:
    """A model to measure: `prepare` once, then outputs and timed passes. Subclasses implement the stream."""

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

    def prefill(self, tokens: Tokens, passes: int) -> Passes:
        """Nanoseconds of each pass, all tokens fed in one call, after one pass that does not count."""
        taken = []
        for _ in range(1 + passes):
            began = time.perf_counter_ns()
            self.feed(tokens)
            taken.append([time.perf_counter_ns() - began])
        return taken[1:]

    def decode(self, tokens: Tokens, passes: int) -> Passes:
        """Nanoseconds of each token of each pass, after one pass that does not count."""
        for token in tokens:
            self.step(int(token))
        timed = []
        for _ in range(passes):
            taken = []
            for token in tokens:
                began = time.perf_counter_ns()
                self.step(int(token))
                taken.append(time.perf_counter_ns() - began)
            timed.append(taken)
        return timed

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
        logits = self._stream.feed(tokens, outputs="last")
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
    """The checkpoint in PyTorch, eager or with one call of each graph of its schedule through torch.compile."""

    def __init__(
        self,
        checkpoint: Path,
        described: Model,
        threads: int,
        compiled: bool,
        config: str | None,
        weights: str | None,
        streams: int = 1,
    ) -> None:
        """streams: number of streams in a call. All consume the same tokens; outputs are those of the first."""
        import torch

        from ..checkpoints import load_checkpoint, options_of

        torch.set_num_threads(threads)
        options = options_of(described, config, weights)
        self._model = load_checkpoint(checkpoint, described.checkpoint_format, options).model.float()
        self._graphs = self._model.graphs(1)
        self._compiled, self._streams = compiled, streams
        self._calls = {graph.name: self._call for graph in self._graphs}
        self.reset()

    def _call(
        self, inputs: Tensor, position: Tensor, learn: Tensor, state: StreamState, graph: Graph
    ) -> tuple[Tensor, StreamState]:
        from ..model import Call

        outputs, following = self._model.call(inputs, state, Call(graph, position, learn))
        return outputs, {name: _packed(value) for name, value in following.items()}

    def prepare(self) -> dict[str, Any]:
        import torch

        notes: dict[str, Any] = {"torch": torch.__version__}
        if not self._compiled:
            return notes
        _decide_branches_on_the_host()
        for graph in self._graphs:
            began = time.monotonic()
            self._calls[graph.name] = torch.compile(self._call, dynamic=False, fullgraph=True, options=_COMPILE_OPTIONS)
            name = f"{graph.name}_call"
            try:
                self._through(graph)
                notes[name] = f"compiled in {time.monotonic() - began:.1f} s"
            except Exception as error:  # torch.compile has many kinds; whatever it was, the call still runs eagerly
                self._calls[graph.name] = self._call
                notes[name] = f"not compiled, runs eagerly: {explain(error)}"
        return notes

    def _through(self, graph: Graph) -> None:
        """Runs a fresh stream until the graph has run at as many places as differ: those that complete a chunk do."""
        self.reset()
        chunk = min((g.tokens for g in self._graphs if g.tokens > 1), default=1)
        tokens = np.zeros(graph.tokens, np.int32)
        runs = 0
        while runs < (1 if graph.tokens > 1 else chunk):
            if may_start(graph, self._position):
                self._advance(tokens, [graph])
                runs += 1
            else:
                self._position += 1  # what the state holds does not matter here
            if self._position > _MOST_POSITIONS:
                break

    def reset(self) -> None:
        import torch

        # Tensors of the kind that a call returns, else they would be compiled for on their own.
        with torch.inference_mode():
            state = self._model.initial_state(self._streams)
            self._state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        self._position = 0

    def feed(self, tokens: Tokens) -> Logits:
        return self._advance(tokens, [graph for _, graph in calls(self._graphs, self._position, len(tokens))])

    def step(self, token: int) -> Logits:
        row: Logits = self.feed(np.array([token], np.int32))[0]
        return row

    def state_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._state.values())

    def start(self) -> None:
        super().start()
        # Every change from one kind of call to the other, so that nothing is left to compile.
        largest = max(graph.tokens for graph in self._graphs)
        once = np.zeros(largest, np.int32)
        for _ in range(2):
            self.feed(once)
            for token in once:
                self.step(int(token))

    def prefill(self, tokens: Tokens, passes: int) -> Passes:
        with self._fewest_guards():
            return super().prefill(tokens, passes)

    def decode(self, tokens: Tokens, passes: int) -> Passes:
        with self._fewest_guards():
            return super().decode(tokens, passes)

    def _fewest_guards(self) -> AbstractContextManager[Any]:
        """Compiled code checks only what tells its graphs apart: nothing else changes while it is measured."""
        import torch

        return torch.compiler.set_stance("default", skip_guard_eval_unsafe=True) if self._compiled else nullcontext()

    def _advance(self, tokens: Tokens, plan: list[Graph]) -> Logits:
        """Consumes the tokens by calls of these graphs."""
        import torch

        rows, done = [], 0
        with torch.inference_mode():
            learn = torch.ones(self._streams, dtype=torch.bool)
            for graph in plan:
                _Host.fills = self._model.completing_tokens(graph, self._position)
                part = torch.from_numpy(tokens[done : done + graph.tokens].astype(np.int64))
                part = part.repeat(self._streams, 1)
                position = torch.full((self._streams,), self._position)
                logits, self._state = self._calls[graph.name](part, position, learn, self._state, graph)
                rows.append(logits[0])
                done += graph.tokens
                self._position += graph.tokens
            result: Logits = torch.cat(rows).numpy()
        return result


def _packed(value: Tensor) -> Tensor:
    """The tensor without gaps also along dimensions of one element, which torch.compile tells apart by their stride."""
    import torch

    strides = [math.prod(value.shape[i + 1 :]) for i in range(value.dim())]
    return value if list(value.stride()) == strides else value.clone(memory_format=torch.contiguous_format)


class _Host:
    """What the host knows about the rows to come: whether each fills its chunk."""

    fills: tuple[bool, ...] = (False,)


def _decide_branches_on_the_host() -> None:
    """Lets the host choose whether a chunk is complete, by the position.

    The operator asks a tensor, where torch.compile has to break its graph. So it is compiled as two whole graphs, which
    makes it faster than it would be by itself: it is what the runtime is measured against.
    """
    from ..model import exported

    def branch(condition: Tensor, yes: Any, no: Any, *args: Tensor, token: int = 0) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = yes(*args) if _Host.fills[token] else no(*args)
        return result

    exported.branch = branch
