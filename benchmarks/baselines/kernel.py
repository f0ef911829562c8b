"""The kernel without ONNX Runtime or Python, timed by the program `neural_memory_run`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.baselines import Baseline, unavailable
from benchmarks.reference import Answer
from titans_export.bench.statistics import Passes
from titans_export.model.neural_memory import STATS, attributes, initial_rows, memory_layout

# Built from the same objects as the installed library.
PROGRAM = Path(__file__).parents[2] / "build" / "runtime" / "bin" / "neural_memory_run"


class Kernel(Baseline):
    what = "our kernel alone, called from a C++ program, the state updated in place"

    def prepare(self) -> dict[str, Any]:
        case = self.case
        if not PROGRAM.is_file():
            raise unavailable("kernel", "the program neural_memory_run is missing", "run make bench, which builds it")
        if case.kind == "mac":
            raise unavailable("kernel", "the program runs one mode only", "see the other rows")
        self._layout = memory_layout(case.spec)
        rows = initial_rows(case.spec, [torch.from_numpy(value) for value in case.data.weights]).numpy()
        self._rows = np.ascontiguousarray(rows)
        self._folder = tempfile.TemporaryDirectory(prefix="titans-bench-")
        self._case, self._out = Path(self._folder.name, "case.safetensors"), Path(self._folder.name, "out.bin")
        calls = self._calls()
        tensors = {f"{i}.{name}": value for i, call in enumerate(calls) for name, value in call.items()}
        description = json.dumps(attributes(case.spec, "update", case.kind != "decode"))
        save_file({"state": self._rows, **tensors}, self._case, {"calls": str(len(calls)), "attributes": description})
        return {"target": self._run(1)["target"]}

    def answer(self) -> Answer:
        self._run(0)
        values = np.fromfile(self._out, np.float32)
        state = values[-self._rows.size :].reshape(self._rows.shape)
        fields = self._layout.unpack(torch.from_numpy(state))
        shapes = [call["q"].shape for call in self._calls()]
        y, at = [], 0
        for shape in shapes:
            size = int(np.prod(shape))
            y.append(values[at : at + size].reshape(shape))
            at += size + shape[0] * shape[1] * len(STATS)
        found = {name: value.numpy() for name, value in fields.items() if name[0] in "WS"}
        return {**found, "y": np.concatenate(y, 2)}

    def run_pass(self) -> list[int]:
        taken: list[int] = self._run(1)["ns"][0]
        return taken

    def run_passes(self, passes: int) -> Passes:
        """Excludes the program's first pass, which is the warm-up."""
        turn: list[list[int]] = self._run(1 + passes)["ns"]
        return turn[1:]

    def state_bytes(self) -> int:
        return self._rows.nbytes

    def memory(self) -> dict[str, int | None]:
        # Resident memory is meaningless here: the program holds the operands of all calls at once.
        return {"state_bytes": self.state_bytes(), "rss_growth_bytes": None}

    def _calls(self) -> list[dict[str, NDArray[Any]]]:
        """The operands of each call, which takes all tokens or one."""
        case = self.case
        if case.kind == "prefill":
            return [dict(case.data.operands)]
        return [
            {
                **{name: np.ascontiguousarray(value[:, :, t : t + 1]) for name, value in case.data.operands.items()},
                "fill": np.full(case.streams, t % case.chunk, np.int64),
            }
            for t in range(case.tokens)
        ]

    def _run(self, repeats: int) -> dict[str, Any]:
        """Runs all calls `repeats` times and returns the program's output; 0: runs once, untimed."""
        command = [str(PROGRAM), str(self._case), str(self._out), "--threads", str(self.case.threads)]
        if repeats:
            command += ["--time", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise unavailable("kernel", f"neural_memory_run failed: {done.stderr.strip()}", "build it again")
        printed: dict[str, Any] = json.loads(done.stdout) if repeats else {}
        return printed


BASELINE: type[Baseline] = Kernel
