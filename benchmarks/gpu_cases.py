"""Cases for timing and checking a GPU: rows of the layer benchmark, and small cases for sanitizers.

Sizes suit a GPU. One set has enough heads and streams to fill it; the other has one stream, which cannot fill it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import costs
from benchmarks.case import Case
from benchmarks.reference import TOLERANCE
from titans_export.model.memory_dtype import pack_row
from titans_export.model.neural_memory import STATS, attributes, initial_rows, memory_layout
from titans_export.model.packed_row import Layout
from titans_export.operators import NEURAL_MEMORY

MLP, LINEAR = (64, 256, 64), (64, 64)
CHUNK = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tolerances by matmul dtype, relative to the largest value of the same output. TF32 keeps 10 bits and bfloat16 7, and a
# state sums such matmuls over several chunks. A wrong coefficient exceeds 0.1.
TOLERANCES = {"float32": TOLERANCE, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
# Tolerances by memory dtype, because W and S are rounded several times.
STORED = {"float32": 0.0, "bfloat16": 5e-2, "float16": 1e-2, "int8": 5e-2, "fp8": 1e-1}
SEED = 1  # of stochastic rounding


@dataclass(frozen=True)
class Row:
    """A case with its dtypes: `values` of q, k, v and y, and the memory dtype of W and S with its rounding.

    bound_by: the measured limit for comparison, "matrix" or "copy". reach_...: the project's goal, as a share of that
    limit or in microseconds per chunk.
    """

    case: Case
    values: str
    memory_dtype: str
    bound_by: str
    reach_share: float | None = None
    reach_us_per_chunk: float | None = None
    rounding: str = "nearest"

    @property
    def name(self) -> str:
        stored = "" if self.memory_dtype == "float32" else f"-stored-{self.memory_dtype}"
        rounded = "" if self.rounding == "nearest" else f"-{self.rounding}"
        return f"{self.case.name}-{self.values}{stored}{rounded}"

    @property
    def node_memory_dtype(self) -> dict[str, Any]:
        """The node's attributes of the memory dtype that differ from their defaults."""
        seed = SEED if self.rounding == "stochastic" else 0
        given = {"memory_dtype": self.memory_dtype, "rounding": self.rounding, "seed": seed}
        return NEURAL_MEMORY.given(given)

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES[self.values], STORED[self.memory_dtype])

    @property
    def layout(self) -> Layout:
        return memory_layout(self.case.spec, self.memory_dtype, self.rounding)

    @property
    def flop_per_pass(self) -> float:
        return float(self.case.flop_per_token * self.case.tokens)

    @property
    def bytes_per_pass(self) -> float:
        """Bytes that decode in the cached form must move in one pass."""
        case = self.case
        per_head = costs.decode_bytes(case.widths, case.chunk)
        # `costs` assumes float32.
        stored = sum(field.words for field in self.layout.fields if field.name[0] in "WS") * 4
        per_head -= (costs.state_bytes(case.widths) - stored) * (1 + 2 / case.chunk)
        return float(case.streams * case.heads * case.tokens * per_head)


def _case(name: str, kind: str, widths: tuple[int, ...], streams: int, tokens: int) -> Case:
    return Case(name, kind, widths, streams, 8, CHUNK, tokens, threads=0)


def rows() -> list[Row]:
    """All rows that are timed, most important first."""
    many, one = _case("prefill-264", "prefill", MLP, 33, 2048), _case("prefill-8", "prefill", MLP, 1, 4096)
    decode, decode_one = _case("decode-1056", "decode", MLP, 132, CHUNK), _case("decode-8", "decode", MLP, 1, CHUNK)
    linear = _case("linear-prefill-264", "prefill", LINEAR, 33, 2048)
    linear_decode = _case("linear-decode-8448", "decode", LINEAR, 1056, CHUNK)
    found = []
    for values in ("bfloat16", "float32"):
        found += [
            Row(many, values, "float32", "matrix", reach_share=0.3),
            Row(decode, values, "float32", "copy", reach_share=0.8),
            Row(one, values, "float32", "matrix", reach_us_per_chunk=40.0),
            Row(decode_one, values, "float32", "copy"),
            Row(linear, values, "float32", "matrix"),
            Row(linear_decode, values, "float32", "copy", reach_share=0.8),
        ]
    found.append(Row(decode, "bfloat16", "bfloat16", "copy", reach_share=0.8))
    found.append(Row(decode, "bfloat16", "bfloat16", "copy", rounding="stochastic"))
    return found + [Row(case, "bfloat16", "int8", bound) for case, bound in ((decode, "copy"), (many, "matrix"))]


def small(row: Row) -> Row:
    """The same memory with few heads and three chunks, for checks against the recurrence before timing."""
    return replace(row, case=replace(row.case, streams=2, heads=2, tokens=3 * row.case.chunk))


def sanitizer_rows() -> list[Row]:
    """Small cases of every path: both schedules, one and several layers, widths that are no multiple of the tiles."""
    found = []
    for widths in ((6, 6), (17, 33, 17), (64, 64), MLP):
        for kind in ("prefill", "decode"):
            chunk = 8 if widths[0] < 64 else 16
            case = Case(f"{kind}-{'x'.join(map(str, widths))}", kind, widths, 2, 2, chunk, 2 * chunk, threads=0)
            found += [Row(case, values, "float32", "copy") for values in ("float32", "bfloat16")]
            found += [
                Row(case, "float32", "int8", "copy"),
                Row(case, "float32", "fp8", "copy", rounding="error_feedback"),
            ]
            found.append(Row(case, "float32", "bfloat16", "copy", rounding="stochastic"))
    return found


def write_case(row: Row, path: Path) -> None:
    """Writes the input file of `neural_memory_run_cuda`: all tokens in one call, or one token per call."""
    from safetensors.torch import save_file  # only this function needs it, and GPU machines may lack it

    case, kind = row.case, DTYPES[row.values]
    tensors = {"state": _initial(row)}
    operands = {name: torch.from_numpy(value) for name, value in case.data.operands.items()}
    operands = {name: value.to(kind) if name in "qkv" else value for name, value in operands.items()}
    calls = 1 if case.kind == "prefill" else case.tokens
    for call in range(calls):
        part = slice(None) if calls == 1 else slice(call, call + 1)
        tensors |= {f"{call}.{name}": value[:, :, part].contiguous() for name, value in operands.items()}
        if calls > 1:
            tensors[f"{call}.fill"] = torch.full((case.streams,), call % case.chunk, dtype=torch.int64)
    node = {**attributes(case.spec, "update", calls == 1), **row.node_memory_dtype}
    save_file(tensors, path, {"calls": str(calls), "attributes": json.dumps(node)})


def read_answer(row: Row, path: Path) -> dict[str, Any]:
    """The values of `benchmarks.reference.recurrence` from the program's output; W and S only if stored in float32."""
    case = row.case
    values = np.fromfile(path, np.float32)
    lead, width, y, at = (case.streams, case.heads), case.widths[0], [], 0
    for tokens in [case.tokens] if case.kind == "prefill" else [1] * case.tokens:
        size = int(np.prod(lead)) * tokens * width
        y.append(values[at : at + size].reshape(*lead, tokens, width))
        at += size + int(np.prod(lead)) * len(STATS)
    found = {"y": np.concatenate(y, 2)}
    if row.memory_dtype == "float32":
        fields = memory_layout(case.spec).unpack(torch.from_numpy(values[at:].reshape(_initial(row).shape)))
        found |= {name: field.numpy() for name, field in fields.items() if name[0] in "WS"}
    return found


def _initial(row: Row) -> torch.Tensor:
    """Packed rows of a new memory."""
    spec, layout = row.case.spec, row.layout
    packed = initial_rows(spec, [torch.from_numpy(value) for value in row.case.data.weights])
    if row.memory_dtype == "float32":
        return packed.contiguous()
    fields = {name: value.numpy() for name, value in memory_layout(spec).unpack(packed.float()).items()}
    return torch.from_numpy(pack_row(fields, layout.fields, layout.size))
