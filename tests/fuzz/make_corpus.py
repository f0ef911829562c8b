"""Writes the first inputs of the fuzz targets into corpus/, small files that are valid; findings lie beside them.

.venv/bin/python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from onnx import TensorProto, helper

CORPUS = Path(__file__).resolve().parent / "corpus"


def _state(name: str, role: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {
        "name": name, "input": f"{name}.in", "output": f"{name}.next", "dtype": "float32", "shape": shape,
        "role": role, **more,
    }  # fmt: skip


def _graph(name: str, tokens: int, stride: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "file": f"{name}.onnx", "tokens": tokens, "stride": stride, "weights": ["E"], **more}


# By the first letters of a field's name.
KINDS = {"W": "weights", "S": "surprise", "E": "rounding_error", "c": "update_count"}


def _field(name: str, offset: int, *shape: int, **more: Any) -> dict[str, Any]:
    kind = KINDS.get(name[0], "coefficient")
    entry = {"name": name, "offset": offset, "shape": list(shape), "kind": kind, **more}
    if kind == "rounding_error":
        return entry | {"written": "chunk", "of": name[1:]}
    return entry | ({"at_start": 0} if kind == "coefficient" else {"written": "chunk"})


MEMORY = _state("m", "memory", [1, 1, 4], layout=[_field("W0", 0, 1, 2), _field("S0", 2, 2)])
MANIFEST: dict[str, Any] = {
    "format": "titans-bundle", "schema_version": 2, "model": {"name": "fuzz"},
    "input": {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": 8},
    "output": {"kind": "logits", "name": "logits", "dtype": "float32", "size": 8},
    "controls": {"position": "position", "learn": "learn"}, "tokenizer": {"kind": "bytes"},
    "state": [MEMORY, _state("last", "cache", [1, 1])],
    "graphs": [_graph("decode", 1, 1), _graph("prefill", 4, 2), _graph("chunk", 2, 2)],
    "weights": {"file": "weights.safetensors"}, "initial_state": {"file": "state.safetensors"}, "files": {},
}  # fmt: skip
ENGINE: dict[str, Any] = {
    "name": "h100-fp16", "target": "h100", "compiler": "tensorrt", "compiler_version": "10.3.0", "precision": "fp16",
    "device": "cuda", "sm": [90], "platform": "linux-x86_64", "cuda": "12.6", "driver": 12060, "memory": "plugin",
    "plugin": {"name": "NeuralMemory", "namespace": "ai.titans", "version": "1"}, "alias": "declared",
    "state_in_place": ["m"], "graphs": [{"graph": "decode", "file": "a.engine"}],
}  # fmt: skip


def manifests() -> Iterator[tuple[str, bytes]]:
    """manifest.json: tokens, vectors, every kind of state and of schedule, engines."""
    row = [_field("W0", 0, 2, 32, dtype="int8"), _field("S0", 18, 2, 2, dtype="bfloat16"), _field("e", 20, 2),
           _field("a", 22, 2), _field("m", 24), _field("f", 25), _field("beta", 26),
           _field("chunk_updates", 27)]  # fmt: skip
    written = {"axis": 2, "first": [0, 4], "period": 4}
    variants: dict[str, dict[str, Any]] = {
        "tokens": {},
        "vectors": {
            "input": {"kind": "vectors", "name": "x", "dtype": "float32", "size": 2},
            "output": {"kind": "vectors", "name": "y", "dtype": "float32", "size": 3},
            "tokenizer": {"kind": "none"},
        },
        "rows": {
            "state": [_state("m", "memory", [1, 2, 28], layout=row, chunk=2, rows={"segment": 4, "longterm": 2})]
        },
        "cache": {"state": [MEMORY, _state("keys", "cache", [1, 2, 9, 2], written=written)]},
        "tokenizer": {"tokenizer": {"kind": "file", "file": "tokenizer.json"}},
        "offsets": {"graphs": [_graph("decode", 1, 4, offsets=[0, 1, 2]), _graph("insert", 1, 4, offsets=[3])]},
        "engines": {
            "engines": [
                ENGINE,
                {**ENGINE, "name": "cpu", "compiler": "onnxruntime", "compiler_version": "1.20.1", "device": "cpu",
                 "sm": [], "cuda": None, "driver": None, "memory": "either", "plugin": None, "alias": None,
                 "state_in_place": [], "weights": {"file": "cpu.safetensors"},
                 "graphs": [{"graph": "decode", "file": "b.onnx", "weights": ["E"]}]},
            ]
        },
        "guard": {
            "guard": {
                "policy": "rewind", "restart_every": 3, "margin": 4,
                "data": {"xxh3_128": "0" * 32, "tokens": 9, "streams": 1},
                "fields": {"m.W0": {"seen": 0.5, "limit": 2.0}, "m.S0": {"seen": 1e-3}},
            }
        },
        "quantised": {"state": [{**MEMORY, "dtype": "float32"}, {**_state("c", "conv", [1, 3]), "dtype": "int8"}]},
    }  # fmt: skip
    for name, changes in variants.items():
        yield f"{name}.json", json.dumps({**copy.deepcopy(MANIFEST), **changes}).encode()


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors() -> Iterator[tuple[str, bytes]]:
    """Files of several types, of none, and with metadata."""
    header = {"a": _entry("F32", [2], 0, 8), "b": _entry("I64", [1, 1], 8, 16), "c": _entry("F16", [2, 2], 16, 24)}
    yield "types", _safetensors(header, bytes(range(24)))
    small = {"d": _entry("U8", [3], 0, 3), "e": _entry("F8_E4M3", [], 3, 4), "n": _entry("I8", [4], 4, 8)}
    yield "small", _safetensors({"__metadata__": {"format": "pt"}, **small}, bytes(range(8)))
    yield "empty", _safetensors({"x": _entry("F32", [0, 3], 0, 0)}, b"")


ROW = [_field("W0", 0, 2, 32, dtype="int8"), _field("EW0", 17, 2, 32, dtype="bfloat16"), _field("S0", 49, 4),
       _field("chunk_updates", 53)]  # fmt: skip
PLAIN = [_field("W0", 0, 2, 32), _field("S0", 64, 4)]
KEPT = [_field("W0", 0, 2, 32, dtype="bfloat16"), _field("EW0", 32, 2, 32), _field("S0", 96, 4)]
P = [_field("W0", 0, 2, 3), _field("S0", 6, 2, 3)]


def _state_file(layout: list[dict[str, Any]], words: int, **changes: str) -> bytes:
    """A state of the bundle that state.cpp writes, its first memory in that layout."""
    states = [("m", "memory", "float32", [1, 2, words], layout), ("p", "memory", "float32", [1, 12], P),
              ("c", "cache", "int8", [1, 5], None)]  # fmt: skip
    listed = [dict(zip(("name", "role", "dtype", "shape", "layout"), state, strict=True)) for state in states]
    listed[-1].pop("layout")
    metadata = {
        "format": "titans-state", "schema_version": "2", "producer": "fuzz", "created": "2025-01-01T00:00:00Z",
        "model": json.dumps({"name": "fuzz", "variant": "lmm", "weights_sha256": "5eed"}), "position": "3",
        "learning": "true", "memory": "{}", "backend": "fuzz", "device": "cpu", "state": json.dumps(listed),
        "xxh3_128": "0" * 32, **changes,
    }  # fmt: skip
    sizes = {"m": 8 * words, "last_output": 32, "p": 48, "c": 5}
    shapes = {"m": [1, 2, words], "last_output": [8], "p": [1, 12], "c": [1, 5]}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, size in sizes.items():
        header[name] = _entry("I8" if name == "c" else "F32", shapes[name], at, at + size)
        at += size
    content = _safetensors(header, bytes(at))
    return content.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(content).encode(), 1)


def states() -> Iterator[tuple[str, bytes]]:
    """The bundle's own dtype, others that are converted, and a stream that has consumed nothing."""
    yield "same.tstate", _state_file(ROW, 54)
    yield "float32.tstate", _state_file(PLAIN, 68)
    yield "bfloat16.tstate", _state_file(KEPT, 100, learning="false")
    # Errors that are of another shape than what they belong to.
    larger = [ROW[0], _field("EW0", 17, 8, 32), _field("S0", 273, 4)]
    yield "larger-errors.tstate", _state_file(larger, 277)
    smaller = [PLAIN[0], _field("EW0", 64, 2), _field("S0", 66, 4)]
    yield "smaller-errors.tstate", _state_file(smaller, 70)
    yield "fresh.tstate", _state_file(ROW, 54, position="0")


def onnx_graphs() -> Iterator[tuple[str, bytes]]:
    """A memory's nodes in a row, in a subgraph and in a function; weights within and outside of the file."""

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def memory(state: str, out: str, operator: str = "NeuralMemory", **more: Any) -> Any:
        given = {"mode": "update", **more} if operator == "NeuralMemory" else more
        return helper.make_node(operator, ["x", state], ["y" + out, out], domain="ai.titans", **given)

    def model(nodes: list[Any], initializers: list[Any] = [], functions: list[Any] = []) -> bytes:  # noqa: B006
        graph = helper.make_graph(nodes, "g", [value("x", 1), value("s", 1, 4)], [value("s2", 1, 4)], initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.titans", 1)]
        return bytes(helper.make_model(graph, functions=functions, opset_imports=opsets).SerializeToString())

    inside = helper.make_tensor("E", TensorProto.FLOAT, [2], [1.0, 2.0])
    outside = TensorProto(name="F", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "weights.safetensors"), ("offset", "64"), ("length", "8")):
        outside.external_data.add(key=key, value=text)
    constant = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT, [1], [1.0]))
    yield "memory.onnx", model([memory("s", "s1"), memory("s1", "s2")], [inside, outside])
    yield "chunk_memory.onnx", model([memory("s", "s2", "ChunkNeuralMemory", chunk_size=4)])
    scatter = helper.make_node("ScatterElements", ["s", "i", "x"], ["s2"], axis=1)
    yield "scatter.onnx", model([constant, helper.make_node("Shape", ["s"], ["i"]), scatter])
    branch = helper.make_graph([memory("s", "s3")], "branch", [], [value("s3", 1, 4)])
    condition = helper.make_node("If", ["x"], ["s2"], then_branch=branch, else_branch=branch)
    yield "branch.onnx", model([condition])
    opsets = [helper.make_opsetid("ai.titans", 1)]
    function = helper.make_function("local", "F", ["x", "s"], ["s1"], [memory("s", "s1", axis=1)], opsets)
    yield "function.onnx", model([helper.make_node("F", ["x", "s"], ["s2"], domain="local")], functions=[function])


def calls() -> Iterator[tuple[str, bytes]]:
    """Sequences of calls of the C interface: any bytes are one."""
    draw = random.Random(0)
    for number in range(40):
        # Low bytes more often: these are what is right, and what creates a stream.
        yield f"calls-{number:02}", bytes(draw.choice((0, draw.randrange(26), draw.randrange(256))) for _ in range(240))


TARGETS = {"manifest": manifests, "safetensors": safetensors, "state": states, "onnx": onnx_graphs, "c_api": calls}


def main() -> None:
    for target, seeds in TARGETS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in seeds():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
