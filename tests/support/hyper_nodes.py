"""Bundles with a HyperConnection node in each graph, which changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from cli_tools import reseal
from onnx import helper, numpy_helper

from titans_export.onnx.hyper_connection import build_hyper_connection_function
from titans_export.operators import DOMAIN, HYPER_CONNECTION

STREAMS, LARGE = 2, 1000.0
# The kernel takes no more than 1000, function bodies take any number.
MORE_THAN_THE_KERNEL_TAKES = 1001


def add_connections(bundle: Path, iterations: int = 20) -> Path:
    """Logits go through a connection of two streams, which gives back the first. The body has 2 iterations in any case:
    more would change nothing.
    """
    for entry in json.loads((bundle / "manifest.json").read_text())["graphs"]:
        path = bundle / entry["file"]
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        [output] = [value for value in graph.output if value.name == "logits"]
        tokens, width = (d.dim_value for d in output.type.tensor_type.shape.dim[1:])
        for node in graph.node:
            node.output[:] = ["plain" if name == "logits" else name for name in node.output]
        shapes = {
            "streams": (1, tokens, STREAMS, width),
            "projection": (width, STREAMS + 1),
            "bias": (STREAMS, STREAMS + 1),
        }
        bias = np.zeros(shapes["bias"], np.float32)
        bias[:, 0] = LARGE, -LARGE
        for name, value in (
            ("projection", np.zeros(shapes["projection"], np.float32)),
            ("bias", bias),
            ("axis", np.array([2])),
            ("two", np.float32(2)),
        ):
            graph.initializer.append(numpy_helper.from_array(value, name))
        connection = helper.make_node(
            HYPER_CONNECTION.name, ["streams", "projection", "bias"], ["logits", "mixed"], domain=DOMAIN, iterations=2
        )
        body = build_hyper_connection_function(shapes, connection)
        assert len(connection.input) < len(HYPER_CONNECTION.inputs)
        connection.overload = body.overload
        connection.attribute[0].i = iterations
        graph.node.extend(
            [
                helper.make_node("Unsqueeze", ["plain", "axis"], ["first"]),
                helper.make_node("Mul", ["first", "two"], ["second"]),
                helper.make_node("Concat", ["first", "second"], ["streams"], axis=2),
                connection,
            ]
        )
        model.functions.append(body)
        onnx.save(model, path)
    reseal(bundle)
    return bundle
