"""Building with the vendor's module, here TensorRT-RTX: what is refused, and what is only logged."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import model_of, value
from onnx import ModelProto, TensorProto, helper, numpy_helper

from titans_export.engines import vendor
from titans_export.engines.messages import BuildError, interruptible, make_log, make_monitor
from titans_export.engines.vendor import Settings, build_network, build_plan, no_collection, parse
from titans_export.errors import MachineError, UsageError
from titans_export.onnx.mapped import write_graph

trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
ADA = Settings(capabilities=(89,))


def product(*shape: Any) -> ModelProto:
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["a", "w"], ["b"], name="product")
    return model_of([node], [value("a", shape)], [value("b", shape)], (weight,))


def build(model: ModelProto, folder: Path, settings: Settings = ADA, progress: Any = lambda text: None) -> Any:
    return build_plan(trt, write_graph(model, folder / "g.onnx"), settings, progress)


def test_an_engine_and_what_is_known_of_it(tmp_path: Path) -> None:
    said: list[str] = []
    built = build(product(4, 16), tmp_path, progress=said.append)
    assert len(built.plan) > 16 * 16 * 4
    assert built.layers["matrix_multiply"] == 1
    assert built.engine_layers is None
    assert any(text.startswith("Building engine") for text in said)


def test_no_garbage_is_collected_while_the_vendor_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection there could free an older builder, which waits for the lock that the vendor holds."""
    collecting: list[bool] = []

    def recording(module: Any) -> Any:
        log = make_log(module)

        class Recording(type(log)):  # type: ignore[misc]
            def log(self, severity: Any, text: str) -> None:
                collecting.append(gc.isenabled())
                super().log(severity, text)

        return Recording()

    monkeypatch.setattr(vendor, "make_log", recording)
    older = [trt.Builder(make_log(trt))]
    freed = weakref.ref(older[0])
    older.append(older)  # type: ignore[arg-type]
    del older
    assert len(build(product(4, 16), tmp_path).plan) > 0
    assert freed() is None
    assert collecting
    assert not any(collecting)
    assert gc.isenabled()


def _input_as_output(folder: Path) -> tuple[Any, Any, Any]:
    """The log, the builder and a network whose output is its input, which is only logged."""
    path = write_graph(product(4, 16), folder / "g.onnx")
    log = make_log(trt)
    with no_collection():
        builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, network, path, log)
    network.mark_output(network.get_input(0))
    return log, builder, network


def test_what_is_only_logged_is_an_error(tmp_path: Path) -> None:
    """A network whose output is its input: the builder gives an engine all the same."""
    log, builder, network = _input_as_output(tmp_path)
    assert log.texts("ERROR"), "the release says it some other way"
    with pytest.raises(BuildError, match="the builder failed"):
        build_network(trt, builder, network, ADA, log)


def test_the_log_without_our_reading_gives_an_engine(tmp_path: Path) -> None:
    """So the test above proves that it is the log that is read."""
    log, builder, network = _input_as_output(tmp_path)
    log.messages.clear()
    assert len(build_network(trt, builder, network, ADA, log).plan) > 0


def test_the_parser_s_error_names_the_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["a"], ["c"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["a", "c"], ["b"], name="mixed"),
    ]
    model = model_of(nodes, [value("a", (4, 4))], [value("b", (4, 4))])
    with pytest.raises(BuildError, match=r"MatMul node 'mixed': .*same input types.*Float.*Half") as error:
        build(model, tmp_path)
    assert "cudaError" not in str(error.value)


def test_an_operator_that_the_parser_lacks(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Unique", ["a"], ["b"], name="odd")], [value("a", (4,))], [value("b", ("n",))])
    with pytest.raises(BuildError, match="Unique node 'odd': unsupported node"):
        build(model, tmp_path)


@pytest.mark.parametrize("sm", [87, 90, 100, 110])
def test_capabilities_it_does_not_list(tmp_path: Path, sm: int) -> None:
    with pytest.raises(MachineError, match=f"SM80.*, got SM{sm}. Fix: give --compiler tensorrt"):
        build(product(4, 16), tmp_path, Settings(capabilities=(sm,)))


def test_one_engine_for_several_capabilities(tmp_path: Path) -> None:
    built = build(product(4, 16), tmp_path, Settings(capabilities=(80, 86, 89, 120, 121)))
    assert len(built.plan) > 0


PROFILE = {"a": ((1, 16), (4, 16), (8, 16))}


def test_open_shapes_need_a_profile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing --profile for a .*\. Fix: give --profile a=MIN:OPT:MAX"):
        build(product("n", 16), tmp_path)
    assert len(build(product("n", 16), tmp_path, Settings(capabilities=(89,), profiles=PROFILE)).plan) > 0


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ({"b": PROFILE["a"]}, "--profile b: the inputs with dynamic shape are a"),
        ({"a": ((1, 8), (4, 8), (8, 8))}, "fit"),
        ({"a": ((1,), (4,), (8,))}, "fit"),
        ({"a": ((8, 16), (4, 16), (1, 16))}, "grow"),
    ],
)
def test_profiles_that_do_not_fit(tmp_path: Path, profiles: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(product("n", 16), tmp_path, Settings(capabilities=(89,), profiles=profiles))


def test_a_profile_for_a_fixed_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--profile a: all shapes are fixed. Fix: leave it out"):
        build(product(4, 16), tmp_path, Settings(capabilities=(89,), profiles=PROFILE))


def test_a_parser_that_loses_an_output(tmp_path: Path) -> None:
    path = write_graph(product(4, 16), tmp_path / "g.onnx")
    other = write_graph(
        model_of([helper.make_node("Relu", ["a"], ["b"])], [value("a", (4, 16))], [value("b", (4, 16))]),
        tmp_path / "other.onnx",
    )

    class Parser:
        def __init__(self, network: Any, log: Any) -> None:
            self.real = trt.OnnxParser(network, log)
            self.num_errors = 0

        def parse_from_file(self, name: str) -> bool:
            done = bool(self.real.parse_from_file(str(other)))
            self.network.unmark_output(self.network.get_output(0))
            return done

    class Module:
        OnnxParser = Parser

    log = make_log(trt)
    with no_collection():
        network = trt.Builder(log).create_network(0)
    Parser.network = network  # type: ignore[attr-defined]
    with pytest.raises(BuildError, match="outputs of the graph: b"):
        parse(Module, network, path, log)


def test_an_interrupt_waits_for_the_vendor() -> None:
    """Between the vendor's frames an exception would end the process."""
    with pytest.raises(KeyboardInterrupt), interruptible() as event:
        monitor = make_monitor(trt, lambda text: None, event)
        monitor.phase_start("p", None, 2)
        assert monitor.step_complete("p", 0)
        os.kill(os.getpid(), signal.SIGINT)
        assert event.wait(5)
        assert not monitor.step_complete("p", 1), "the builder goes on"


def test_progress_that_fails_stops_the_build() -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError

    assert not make_monitor(trt, fail, threading.Event()).step_complete("p", 0)
