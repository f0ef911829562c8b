"""torch.onnx.export as used in this project: fixed shapes, no output, reproducible bytes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from .shared_tables import shared_tables

OPSET = 20
IR_VERSION = 10  # the first with function overloads


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the exporter's notes on optional packages and its deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(graph: onnx.GraphProto) -> None:
    """Removes stack traces and similar metadata, which contain absolute paths of the machine."""
    graph.ClearField("metadata_props")
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


def trace_ir(module: nn.Module, args: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Traces the module to an optimised model of fixed shapes, whose initialisers share the memory of the tensors."""
    with quiet(), shared_tables(), torch.no_grad():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    return program.model


def to_proto(traced: ir.Model) -> onnx.ModelProto:
    """The traced model with its initialisers, without machine-dependent metadata."""
    model = ir.to_proto(traced)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "titans-export", ""
    model.ClearField("metadata_props")
    _strip(model.graph)
    return model


def trace(
    module: nn.Module, args: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Traces the module to an ONNX model of fixed shapes, without machine-dependent metadata."""
    return to_proto(trace_ir(module, args, inputs, outputs))
