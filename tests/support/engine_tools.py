"""What tests of engines share: small graphs, streams through ONNX Runtime, and a stand-in for full TensorRT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from titans_export.bundle import Bundle
from titans_export.engines import graphs
from titans_export.onnx.nodes import attribute, is_memory


def value(name: str, shape: tuple[Any, ...], element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: tuple[Any, ...] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.titans", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto | Path, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def stream_logits(
    bundle: Bundle, sessions: dict[str, onnxruntime.InferenceSession], count: int
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Logits of the golden tokens by the schedule of docs/bundle.md, and the state after them."""
    tokens, state, at, rows = bundle.golden().inputs, bundle.initial_state(), 0, []
    by_length = sorted(bundle.manifest.graphs, key=lambda graph: -graph.tokens)
    while at < count:
        fits = (g for g in by_length if g.name in sessions and g.tokens <= count - at)
        graph = next(g for g in fits if at % g.stride in g.offsets)
        names = [output.name for output in sessions[graph.name].get_outputs()]
        feed = {
            "tokens": tokens[at : at + graph.tokens].astype(np.int64)[None],
            "position": np.array([at], np.int64),
            "learn": np.array([True]),
            "slots": np.array([0], np.int64),
            **{entry.input: state[entry.name] for entry in bundle.manifest.state},
        }
        wanted = {given.name for given in sessions[graph.name].get_inputs()}  # graphs of one stream take no slots
        feed = {name: array for name, array in feed.items() if name in wanted}
        given = dict(zip(names, sessions[graph.name].run(names, feed), strict=True))
        rows.append(given["logits"][0])
        state = {entry.name: given[entry.output] for entry in bundle.manifest.state}
        at += graph.tokens
    return np.concatenate(rows), state


def bare_types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every value of a graph, from its own operators' rules."""
    inferred = onnx.shape_inference.infer_shapes(graphs.inline(model)).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


class TensorRTDouble:
    """Full TensorRT as far as a machine without it can have it: tensorrt_rtx, with a parser that knows the plugin.

    Each memory node is held to what the plugin takes, then given the function body that the bundle has for it, and
    TensorRT-RTX parses and builds the rest. `seen` collects what the builder was asked for.
    """

    def __init__(self, trt: Any, bundle: Path, version: str = "10.3.0", capability: int = 89) -> None:
        self._trt, self.__version__ = trt, version
        self.seen = SimpleNamespace(nodes=[], libraries=[], opened=[], preview={}, serialized=[], pools={}, caches=[])
        seen = self.seen
        self._functions = {}
        for path in bundle.glob("*.onnx"):
            source = onnx.load(str(path), load_external_data=False)
            self._functions[_tokens(source)] = list(source.functions)
        double = self

        class Registry:
            def load_library(self, path: str) -> object:
                seen.libraries.append(path)
                return object()

            @property
            def all_creators(self) -> list[Any]:
                return [SimpleNamespace(name="NeuralMemory", plugin_namespace="ai.titans")] * bool(seen.libraries)

        class Config:
            def __init__(self, config: Any) -> None:
                object.__setattr__(self, "real", config)
                config.num_compute_capabilities = 1
                config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], 0)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def __setattr__(self, name: str, given: Any) -> None:
                if name == "plugins_to_serialize":
                    seen.serialized = list(given)
                else:
                    setattr(self.real, name, given)

            def set_preview_feature(self, feature: Any, on: bool) -> None:
                seen.preview[feature.name] = on

            def set_memory_pool_limit(self, pool: Any, count: int) -> None:
                seen.pools[pool.name] = count
                self.real.set_memory_pool_limit(pool, count)

            def create_timing_cache(self, data: bytes) -> Any:
                seen.caches.append(data)
                return None if data == b"another device" else SimpleNamespace()

            def set_timing_cache(self, cache: Any, ignore: bool) -> bool:
                return not ignore

            def get_timing_cache(self) -> Any:
                return SimpleNamespace(serialize=lambda: b"timings")

        class Builder:
            def __init__(self, log: Any) -> None:
                self.real = trt.Builder(log)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def get_plugin_registry(self) -> Registry:
                return Registry()

            def create_builder_config(self) -> Config:
                return Config(self.real.create_builder_config())

            def build_serialized_network(self, network: Any, config: Config) -> Any:
                seen.tf32 = config.real.get_flag(trt.BuilderFlag.TF32)
                return self.real.build_serialized_network(network, config.real)

        class OnnxParser:
            def __init__(self, network: Any, log: Any) -> None:
                self.real = trt.OnnxParser(network, log)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def parse_from_file(self, path: str) -> bool:
                model = onnx.load(path)
                double._take_plugins(model)
                return bool(self.real.parse(graphs.inline(model).SerializeToString()))

        class Runtime:
            """One that opens everything, as a device would."""

            def __init__(self, log: Any) -> None:
                pass

            def get_plugin_registry(self) -> Registry:
                return Registry()

            def deserialize_cuda_engine(self, plan: Any) -> Any:
                seen.opened.append(len(plan))
                said = '{"Layers": [{"Name": "first"}, "second"]}'
                return SimpleNamespace(
                    create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda form: said)
                )

        self.Builder, self.OnnxParser, self.Runtime = Builder, OnnxParser, Runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)

    def _take_plugins(self, model: onnx.ModelProto) -> None:
        """What the plugin would compute, in operators: casts to the body's float32, the body, casts back."""
        assert not model.functions, "a function would win over the plugin"
        nodes, used = [], []
        for node in model.graph.node:
            if not is_memory(node):
                nodes.append(node)
                continue
            said = {a.name: attribute(node, a.name) for a in node.attribute}
            self.seen.nodes.append({**said, "overload": node.overload, "present": list(node.input)})
            assert (said["plugin_namespace"], said["plugin_version"]) == ("ai.titans", "1")
            assert said["inputs"].count(",") + 1 == len(node.input) and all(node.input)
            assert said["outputs"].count(",") + 1 == len(node.output)
            body = next(f for f in self._functions[_tokens(model)] if _fits(f, said))
            given = dict(zip(said["inputs"].split(","), node.input, strict=True))
            casts_in, casts_out = _casts(model, given, node)
            call = helper.make_node(
                "NeuralMemory",
                [given.get(name, "") for name in body.input],
                [*node.output, *(f"{node.name}.unused{i}" for i in range(len(body.output) - len(node.output)))],
                domain="ai.titans",
            )
            call.overload = body.overload
            if casts_out:
                call.output[0] = casts_out[0].input[0]
            nodes += [*casts_in, call, *casts_out]
            used.append(body)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
        model.functions.extend({f.overload: f for f in used}.values())


def _tokens(model: onnx.ModelProto) -> int:
    return int(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)


def _fits(function: onnx.FunctionProto, said: dict[str, Any]) -> bool:
    kind = said["mode"] if said["mode"] == "read" else f"{said['mode']}_{said['schedule']}"
    return function.overload.startswith(f"{kind}_") and "w" + "x".join(map(str, said["widths"])) in function.overload


def _casts(model: onnx.ModelProto, given: dict[str, str], node: onnx.NodeProto) -> tuple[list[Any], list[Any]]:
    """Around a node whose q is of a low type: q, k and v up to float32 and y down again."""
    producers = {name: maker for maker in model.graph.node for name in maker.output}
    maker = producers.get(given["q"])
    to = attribute(maker, "to") if maker is not None and maker.op_type == "Cast" else TensorProto.FLOAT
    if to == TensorProto.FLOAT:
        return [], []
    up = []
    for name in ("q", "k", "v"):
        if name in given:
            up.append(helper.make_node("Cast", [given[name]], [f"{node.name}.{name}"], to=TensorProto.FLOAT))
            given[name] = f"{node.name}.{name}"
    return up, [helper.make_node("Cast", [f"{node.output[0]}.up"], [node.output[0]], to=to)]
