"""A small bundle with state, and the same model in numpy.

The model is a leaky sum with a switch: for each token x with vector e = E[x],
    y_t = W_{t-1} e                      what the memory says, before it learns
    W_t = a W_{t-1} + learn * e p'       p the vector of the token before (a cache)
    logits_t = U y_t + U e + 0.001 * position
so every part of the runtime's contract shows in the logits: order, position, learning, both kinds of state.

With vectors in the tokens' stead e = x E, and what the logits were is the output. With a period P the memory is halved
after the tokens at P - 1, 2 P - 1, ..., which only graphs that know the position modulo P can do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import xxhash
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
DECAY = np.float32(0.9)
GRAPHS = (("prefill", 8, 4), ("chunk", 4, 4), ("decode", 1, 1))  # name, tokens, stride
PERIOD = 4
# The same where the memory is halved every PERIOD tokens: which graph runs shows in the numbers. And offsets.
PERIODIC_GRAPHS = (
    ("prefill", 8, 4),
    ("middle", 2, 4, (1,)),
    ("decode", 1, 4, (0, 1, 2)),
    ("halve", 1, 4, (3,)),
)
Graph: TypeAlias = "tuple[str, int, int] | tuple[str, int, int, tuple[int, ...]]"
MEMORY, CACHE = "layers.0.memory", "layers.0.previous"


@dataclass
class Weights:
    """What the graphs share. The ballast multiplies something and is then multiplied by zero."""

    embed: Array  # E (vocab, width), or (size of an input vector, width)
    unembed: Array  # U (width, vocab), or (width, size of an output vector)
    initial: Array  # W of a fresh stream
    ballast: Array | None = None  # square: a large weight, for measuring memory and time

    @staticmethod
    def random(vocab: int = 16, width: int = 6, seed: int = 0, ballast: int = 0, outputs: int | None = None) -> Weights:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> Array:
            return rng.normal(size=shape).astype(np.float32)

        return Weights(
            draw(vocab, width),
            draw(width, vocab if outputs is None else outputs),
            0.1 * draw(width, width),
            draw(ballast, ballast) if ballast else None,
        )

    def named(self) -> dict[str, Array]:
        tensors = {"embed": self.embed, "unembed": self.unembed}
        return tensors if self.ballast is None else {**tensors, "ballast": self.ballast}


@dataclass
class Reference:
    """The model in numpy, one token at a time."""

    weights: Weights
    learning: bool = True
    position: int = 0
    period: int = 0  # 0: the memory is never halved
    memory: Array = field(init=False)
    previous: Array = field(init=False)

    def __post_init__(self) -> None:
        self.memory = self.weights.initial.copy()
        self.previous = np.zeros(self.weights.embed.shape[1], np.float32)

    def step(self, token: int | Array) -> Array:
        e = self.weights.embed[token] if np.ndim(token) == 0 else token @ self.weights.embed
        y = self.memory @ e
        self.memory = DECAY * self.memory + np.outer(e, self.previous) if self.learning else self.memory
        self.previous = e
        logits = (y + e) @ self.weights.unembed + np.float32(0.001 * self.position)
        self.position += 1
        if self.period and self.position % self.period == 0:
            self.memory = self.memory / 2
        return np.asarray(logits, np.float32)

    def feed(self, tokens: Sequence[int] | Array) -> Array:
        return np.stack([self.step(token) for token in tokens])


def log_softmax(logits: Array) -> Array:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _graph(
    weights: Weights, tokens: int, offsets: dict[str, tuple[int, int]], vectors: bool, halvings: Sequence[bool]
) -> onnx.ModelProto:
    """`tokens` steps unrolled, the memory halved after those of `halvings`."""
    size, width = weights.embed.shape
    outputs = weights.unembed.shape[1]
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    if vectors:
        op("MatMul", "x", "embed", out="vectors")  # (1, T, width)
    else:
        op("Gather", "embed", "tokens", out="vectors")
    op("Cast", "position", out="position_float", to=TensorProto.FLOAT)
    op("Slice", MEMORY, "zero", "size", "two", out="packed")  # W is the first field of the row, S the rest
    op("Slice", MEMORY, "size", "end", "two", out="rest")
    op("Reshape", "packed", "square", out="memory_0")  # (width, width)
    memory, previous = "memory_0", CACHE
    rows = []
    for t in range(tokens):
        op("Gather", "vectors", f"index_{t}", out=f"e_{t}", axis=1)  # (1, 1, width)
        op("Reshape", f"e_{t}", "column", out=f"column_{t}")  # (width, 1)
        op("MatMul", memory, f"column_{t}", out=f"y_{t}")
        op("Mul", memory, "decay", out=f"decayed_{t}")
        op("MatMul", f"column_{t}", previous, out=f"outer_{t}")
        op("Add", f"decayed_{t}", f"outer_{t}", out=f"learned_{t}")
        memory = op("Where", "learn", f"learned_{t}", memory, out=f"memory_{t + 1}")
        if halvings[t]:
            memory = op("Mul", memory, "half", out=f"halved_{t}")
        previous = op("Reshape", f"column_{t}", "row", out=CACHE + ".next" if t == tokens - 1 else f"previous_{t}")
        op("Add", f"y_{t}", f"column_{t}", out=f"h_{t}")
        op("Reshape", f"h_{t}", "row", out=f"row_{t}")
        op("MatMul", f"row_{t}", "unembed", out=f"plain_{t}")
        op("Add", "position_float", f"float_{t}", out=f"position_{t}")
        op("Mul", f"position_{t}", "slope", out=f"shift_{t}")
        rows.append(op("Add", f"plain_{t}", f"shift_{t}", out=f"logits_{t}"))
    op("Concat", *rows, out="rows", axis=0)
    total = "rows"
    if weights.ballast is not None:
        op("ReduceMax", "vectors", "axis_2", out="narrow", keepdims=1)  # (1, T, 1)
        op("Expand", "narrow", "ballast_row", out="expanded")  # (1, T, n)
        op("MatMul", "expanded", "ballast", out="product")
        op("Squeeze", "product", "axis_0", out="wide")
        op("ReduceMax", "wide", "axis_1", out="widest")  # (T, 1)
        op("Mul", "widest", "nought", out="nothing")
        total = op("Add", "rows", "nothing", out="with_ballast")
    output = "y" if vectors else "logits"
    op("Unsqueeze", total, "axis_0", out=output)
    op("Reshape", memory, "flat_shape", out="packed_next")
    op("Concat", "packed_next", "rest", out=MEMORY + ".next", axis=2)

    def constant(name: str, value: Any, dtype: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value, dtype), name)

    constants = [
        constant("zero", [0], np.int64),
        constant("size", [width * width], np.int64),
        constant("end", [width * width + 2], np.int64),
        constant("two", [2], np.int64),
        constant("square", [width, width], np.int64),
        constant("column", [width, 1], np.int64),
        constant("row", [1, width], np.int64),
        constant("flat_shape", [1, 1, width * width], np.int64),
        constant("axis_0", [0], np.int64),
        constant("axis_1", [1], np.int64),
        constant("axis_2", [2], np.int64),
        constant("decay", DECAY, np.float32),
        constant("slope", 0.001, np.float32),
        constant("half", 0.5, np.float32),
        constant("nought", 0.0, np.float32),
    ]
    if weights.ballast is not None:
        constants.append(constant("ballast_row", [1, 1, len(weights.ballast)], np.int64))
    for t in range(tokens):
        constants += [constant(f"index_{t}", [t], np.int64), constant(f"float_{t}", [t], np.float32)]
    large = []
    for name, array in weights.named().items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = offsets[name]
        for key, value in (("location", "weights.safetensors"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        large.append(tensor)

    def info(name: str, kind: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    memory_shape, cache_shape = (1, 1, width * width + 2), (1, width)
    graph = helper.make_graph(
        nodes,
        "leaky_sum",
        [
            info("x", TensorProto.FLOAT, (1, tokens, size))
            if vectors
            else info("tokens", TensorProto.INT64, (1, tokens)),
            info("position", TensorProto.INT64, (1,)),
            info("learn", TensorProto.BOOL, (1,)),
            info(MEMORY, TensorProto.FLOAT, memory_shape),
            info(CACHE, TensorProto.FLOAT, cache_shape),
        ],
        [
            info(output, TensorProto.FLOAT, (1, tokens, outputs)),
            info(MEMORY + ".next", TensorProto.FLOAT, memory_shape),
            info(CACHE + ".next", TensorProto.FLOAT, cache_shape),
        ],
        large + constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _stream_graph(
    weights: Weights, tokens: int, offsets: dict[str, tuple[int, int]], halvings: Sequence[bool]
) -> onnx.ModelProto:
    """`tokens` steps unrolled, for any number of streams at once, whose state lies in pools."""
    width, outputs = weights.unembed.shape
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def constant(name: str, value: Any, dtype: Any = np.int64) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    zero, size, end, axis = (constant(f"at_{n}", [n]) for n in (0, width * width, width * width + 2, 2))
    square, column_shape = constant("square", [-1, width, width]), constant("column", [-1, width, 1])
    row_shape, flat = constant("row", [-1, 1, width]), constant("flat", [-1, width])
    packed_shape, single = constant("packed", [-1, 1, width * width]), constant("single", [-1, 1, 1])
    decay, slope = constant("decay", DECAY, np.float32), constant("slope", 0.001, np.float32)
    half, nought = constant("half", 0.5, np.float32), constant("nought", 0.0, np.float32)
    places = op("Unsqueeze", "slots", constant("axis_1", [1]), out="places")
    vectors = op("Gather", "embed", "tokens", out="vectors")  # (B, T, width)
    position = op("Reshape", op("Cast", "position", out="floats", to=TensorProto.FLOAT), single, out="positions")
    learn = op("Reshape", "learn", single, out="learns")
    row = op("Gather", MEMORY, "slots", out="rows")  # (B, 1, R)
    memory = op("Reshape", op("Slice", row, zero, size, axis, out="weights"), square, out="memory_0")
    rest = op("Slice", row, size, end, axis, out="rest")
    first = op("Gather", CACHE, "slots", out="first")
    previous = op("Reshape", first, row_shape, out="previous")
    rows = []
    for t in range(tokens):
        column = op("Reshape", op("Gather", vectors, constant(f"index_{t}", [t]), out=f"e_{t}", axis=1), column_shape,
                    out=f"column_{t}")  # fmt: skip
        y = op("MatMul", memory, column, out=f"y_{t}")  # (B, width, 1)
        learned = op("Add", op("Mul", memory, decay, out=f"decayed_{t}"),
                     op("MatMul", column, previous, out=f"outer_{t}"), out=f"learned_{t}")  # fmt: skip
        memory = op("Where", learn, learned, memory, out=f"memory_{t + 1}")
        if halvings[t]:
            memory = op("Mul", memory, half, out=f"halved_{t}")
        previous = op("Reshape", column, row_shape, out=f"previous_{t}")
        h = op("Reshape", op("Add", y, column, out=f"sum_{t}"), row_shape, out=f"h_{t}")
        plain = op("MatMul", h, "unembed", out=f"plain_{t}")
        at = op("Add", position, constant(f"float_{t}", t, np.float32), out=f"position_{t}")
        rows.append(op("Add", plain, op("Mul", at, slope, out=f"shift_{t}"), out=f"logits_{t}"))
    op("Concat", *rows, out="logits", axis=1)
    packed = op("Reshape", memory, packed_shape, out="packed_next")
    op("ScatterND", MEMORY, places, op("Concat", packed, rest, out="next_rows", axis=2), out=MEMORY + ".next")
    # The new row depends on the old one, so that the pool is read before it is written.
    last = op("Reshape", previous, flat, out="last")
    after = op("Add", last, op("Mul", first, nought, out="nothing"), out="after")
    op("ScatterND", CACHE, places, after, out=CACHE + ".next")
    large = []
    for name, array in weights.named().items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = offsets[name]
        for key, value in (("location", "weights.safetensors"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        large.append(tensor)
    info = helper.make_tensor_value_info
    pools = {MEMORY: ("slots", 1, width * width + 2), CACHE: ("slots", width)}
    graph = helper.make_graph(
        nodes,
        "leaky_sums",
        [
            info("tokens", TensorProto.INT64, ("streams", tokens)),
            info("position", TensorProto.INT64, ("streams",)),
            info("learn", TensorProto.BOOL, ("streams",)),
            info("valid", TensorProto.INT64, ("streams",)),
            info("slots", TensorProto.INT64, ("streams",)),
            *(info(name, TensorProto.FLOAT, shape) for name, shape in pools.items()),
        ],
        [
            info("logits", TensorProto.FLOAT, ("streams", tokens, outputs)),
            *(info(name + ".next", TensorProto.FLOAT, shape) for name, shape in pools.items()),
        ],
        large + constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def tensor_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in a safetensors file: (offset, bytes)."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in spans.items()}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with the sizes and hashes of the files as they are now."""
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json" and path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def write_bundle(
    folder: Path,
    weights: Weights,
    graphs: Sequence[Graph] = GRAPHS,
    *,
    period: int = 0,
    vectors: bool = False,
    streams: bool = False,
) -> Path:
    """streams: the graphs take any number of streams."""
    folder.mkdir(parents=True)
    size, width = weights.embed.shape
    outputs = weights.unembed.shape[1]
    save_file(weights.named(), folder / "weights.safetensors")
    row = np.concatenate([weights.initial.ravel(), np.float32([7, 8])]).astype(np.float32)
    save_file({MEMORY: row[None, None], CACHE: np.zeros((1, width), np.float32)}, folder / "state.safetensors")
    offsets = tensor_offsets(folder / "weights.safetensors")
    for name, tokens, _, *starts in graphs:
        start = starts[0][0] if starts else 0
        halvings = [period > 0 and (start + t) % period == period - 1 for t in range(tokens)]
        if streams:
            graph = _stream_graph(weights, tokens, offsets, halvings)
        else:
            graph = _graph(weights, tokens, offsets, vectors, halvings)
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())
    rng = np.random.default_rng(3)
    given: Array = rng.normal(size=(13, size)).astype(np.float32) if vectors else rng.integers(0, size, 13, np.int32)
    golden = {"x": "x", "y": "y"} if vectors else {"x": "tokens", "y": "logits"}
    answers = Reference(weights, period=period).feed(given)
    save_file({golden["x"]: given, golden["y"]: answers}, folder / "golden.safetensors")

    def state(name: str, shape: list[int], role: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "input": name,
            "output": name + ".next",
            "dtype": "float32",
            "shape": shape,
            "role": role,
            **more,
        }

    square = width * width
    layout = [
        {"name": "W0", "offset": 0, "shape": [width, width]},
        {"name": "S0", "offset": square, "shape": [2]},
    ]
    if vectors:
        described = {
            "input": {"kind": "vectors", "name": "x", "dtype": "float32", "size": size},
            "output": {"kind": "vectors", "name": "y", "dtype": "float32", "size": outputs},
            "tokenizer": {"kind": "none"},
            "golden": {"file": "golden.safetensors", "vectors": "x", "outputs": "y", "tolerance": 1e-4},
        }
    else:
        described = {
            "input": {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": size},
            "output": {"kind": "logits", "name": "logits", "dtype": "float32", "size": outputs},
            "tokenizer": {"kind": "bytes"},
            "golden": {"file": "golden.safetensors", "tokens": "tokens", "logits": "logits", "tolerance": 1e-4},
        }
    write_manifest(
        folder,
        {
            "format": "titans-bundle",
            "schema_version": 2,
            "producer": "synthetic",
            "model": {
                "name": "leaky-sum",
                "variant": "none",
                "parameters": sum(w.size for w in weights.named().values()),
            },
            **described,
            "controls": {
                "position": "position",
                "learn": "learn",
                **({"valid": "valid", "slots": "slots"} if streams else {}),
            },
            "state": [
                state(MEMORY, [1, 1, square + 2], "memory", layout=layout),
                state(CACHE, [1, width], "cache"),
            ],
            "graphs": [
                {
                    "name": name,
                    "file": f"{name}.onnx",
                    "tokens": tokens,
                    "stride": stride,
                    "weights": sorted(weights.named()),
                    **({"offsets": list(starts[0])} if starts else {}),
                }
                for name, tokens, stride, *starts in graphs
            ],
            "weights": {"file": "weights.safetensors"},
            "initial_state": {"file": "state.safetensors"},
        },
    )
    return folder
