"""The layer of the package titans-pytorch, eager, as its users run it. Its mathematics differs from ours.

It has one momentum and one forget gate per chunk instead of per token, a loss averaged over the head's width, and its
own norms and projections. Its answer is therefore not compared, and its speed is only informative. Chunk size and
gradient points match ours: `chunk` tokens per chunk and a new point for each chunk.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.baselines import Baseline, unavailable
from benchmarks.reference import Answer


class TitansPyTorch(Baseline):
    what = "titans-pytorch's layer, eager: other mathematics, and with projections and norms"
    same_mathematics = False

    @torch.inference_mode()
    def prepare(self) -> dict[str, Any]:
        case = self.case
        if case.kind == "mac":
            raise unavailable("titans-pytorch", "it cannot read before updating", "see the other rows")
        try:
            from titans_pytorch import MemoryMLP, NeuralMemory
        except ImportError as error:
            raise unavailable("titans-pytorch", f"cannot import it: {error}", "pip install '.[bench]'") from None
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        width, dim = case.widths[0], case.widths[0] * case.heads
        depth = len(case.widths) - 1
        self._layer = NeuralMemory(
            dim,
            chunk_size=case.chunk,
            batch_size=case.chunk,
            dim_head=width,
            heads=case.heads,
            model=MemoryMLP(width, depth=depth, expansion_factor=case.widths[1] / width),
            mem_model_norm_add_residual=False,
        ).eval()
        self._tokens = torch.randn(case.streams, case.tokens, dim)
        self._state: Any = None
        self.run_pass()
        return {"torch": torch.__version__}

    def answer(self) -> Answer:
        return {}

    @torch.inference_mode()
    def run_pass(self) -> list[int]:
        size, taken = self.case.tokens if self.case.kind == "prefill" else 1, []
        for part in self._tokens.split(size, 1):
            began = time.perf_counter_ns()
            _, self._state = self._layer(part, state=self._state)
            taken.append(time.perf_counter_ns() - began)
        return taken

    def state_bytes(self) -> int:
        return _bytes(self._state)


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested tuples and mappings; each tensor counts once."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            memory_dtype = value.untyped_storage()
            found[memory_dtype.data_ptr()] = memory_dtype.nbytes()
        elif isinstance(value, (tuple, list)):
            for inner in value:
                visit(inner)
        elif hasattr(value, "values"):
            for inner in value.values():
                visit(inner)

    visit(value)
    return sum(found.values())


BASELINE: type[Baseline] = TitansPyTorch
