"""Baselines for tests of the benchmarks: one that is right, one that is wrong, one that ends its process."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.baselines import Baseline
from benchmarks.baselines.torch_eager import TorchEager
from benchmarks.reference import Answer
from titans_export.bench.models import Logits, Runtime, Tokens


class Wrong(TorchEager):
    what = "one retrieval is a little off"

    def answer(self) -> Answer:
        answer = {name: value.copy() for name, value in super().answer().items()}
        answer["y"][0, 0, 3, 0] += 1e-3
        return answer


class WrongModel(Runtime):
    """Its logits are a little off from the tenth token on, however they are asked for."""

    def all_logits(self, tokens: Tokens, one_by_one: bool) -> Logits:
        logits = super().all_logits(tokens, one_by_one).copy()
        logits[10:] += 1e-2
        return logits


class Box:
    """What a worker holds."""

    def __init__(self, value: int) -> None:
        if value < 0:
            raise ValueError("negative")
        self.value = value

    def add(self, other: int) -> int:
        print("noise on stdout")
        return self.value + other

    def fail(self) -> None:
        raise RuntimeError("broken\nin two lines")

    def crash(self) -> None:
        os.write(2, b"last words\n")
        os._exit(7)

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)


BASELINE: type[Baseline] = Wrong


class WrongStreams:
    """A stand-in for an implementation of the benchmark of many streams, with wrong outputs."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def prepare(self) -> dict[str, Any]:
        return {}

    def outputs(self, tokens: Any) -> Any:
        return np.full((1, self._vocabulary), 100.0, np.float32)

    def decode(self, tokens: Any, passes: int) -> list[list[int]]:
        return [[1] * len(tokens)] * passes
