"""ai.titans::HyperConnection: the kernel, the function body and the reference against titans-pytorch's own
hyper-connections.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import worst
from onnx import TensorProto, helper
from onnx_ops import LIBRARY, Arrays, make_session
from tolerances import TOLERANCES
from torch import Tensor, nn

from titans_export.engines.graphs import inline, with_plugin
from titans_export.engines.onnxruntime import optimise
from titans_export.engines.vendor import Settings, build_plan
from titans_export.model.hyper_connection import hyper_connection
from titans_export.onnx.hyper_connection import build_hyper_connection_function
from titans_export.onnx.mapped import write_graph
from titans_export.onnx.tracing import trace
from titans_export.operators import DOMAIN, HYPER_CONNECTION

library = pytest.importorskip("hyper_connections.mHCv2", reason="titans-pytorch is not installed: make setup")

OPERATOR, OUTPUTS = HYPER_CONNECTION.name, HYPER_CONNECTION.outputs
TOLERANCE = TOLERANCES["cpu-kernel", "float32"]
needs_kernel = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernel is not built: make setup")
HOW = [pytest.param("kernel", marks=needs_kernel), "body", "reference"]


@dataclass
class Case:
    """A connection of titans-pytorch with random parameters, and what it is given."""

    streams: int
    width: int
    tokens: int = 5
    batch: int = 2
    beta: bool = True
    branch: bool = True
    iterations: int = 20
    dtype: torch.dtype = torch.float64
    seed: int = 0
    connection: nn.Module = field(init=False)
    residuals: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.connection = library.ManifoldConstrainedHyperConnections(
            self.streams, dim=self.width, add_branch_out_to_residual=self.beta, sinkhorn_iters=self.iterations
        ).to(self.dtype)
        with torch.no_grad():
            for parameter in self.connection.parameters():
                parameter.copy_(torch.randn_like(parameter))
            # Products with the norm's sqrt(D) in them, then of order 1.
            self.connection.dynamic_alpha_fn.mul_(self.width**-0.5)
            if self.beta:
                self.connection.dynamic_beta_fn.mul_(self.width**-0.5)
        shape = self.batch, self.tokens, self.streams, self.width
        self.residuals = torch.randn(shape, dtype=self.dtype)
        self.given = None
        if self.branch:
            self.given = (
                torch.randn(shape[0], shape[1], shape[3], dtype=self.dtype),
                2 * torch.rand(shape[:3], dtype=self.dtype),
            )

    def expected(self) -> list[Tensor]:
        """The library's answer. It casts to float32, which is left out, so that it is right to all digits of dtype."""
        c = self.connection
        unchanged = patch.object(torch.Tensor, "float", lambda x: x)
        with torch.no_grad(), unchanged:
            residuals = self.residuals
            if self.given is not None:
                branch, weight = self.given
                adding = library.ManifoldConstrainedHyperConnections(self.streams, dim=self.width)
                residuals = adding.depth_connection(branch, residuals, beta=weight[..., None, None])
            result, mixed, rest = c.width_connection(residuals)
        return [result, mixed, *([rest["beta"].reshape(mixed.shape[:3])] if self.beta else [])]

    def operands(self) -> dict[str, Tensor]:
        """The operator's inputs: scales are part of the projection."""
        c = self.connection
        with torch.no_grad():
            scale = torch.cat([c.pre_branch_scale, c.residual_scale.expand(self.streams)])
            columns, bias = [c.dynamic_alpha_fn[0] * scale], [c.static_alpha]
            if self.beta:
                columns.append(c.dynamic_beta_fn * c.h_post_scale)
                bias.append(c.static_beta[:, :, 0])
            norm = (c.norm.gamma + 1) * self.width**0.5
            found = {
                "residuals": self.residuals,
                "projection": norm.unsqueeze(-1) * torch.cat(columns, 1),
                "bias": torch.cat(bias, 1),
            }
        return found | (dict(zip(("branch", "weight"), self.given, strict=True)) if self.given else {})


def make_model(feeds: Arrays, body: bool, outputs: tuple[str, ...], iterations: int | None = 20) -> onnx.ModelProto:
    """One node over inputs of the feeds' shapes, with its function body or for the kernel."""
    batch, tokens, streams, width = feeds["residuals"].shape
    shapes = {"input": (batch, tokens, width), "residuals_out": (batch, tokens, streams, width)}
    shapes |= {"beta": (batch, tokens, streams)}
    names = HYPER_CONNECTION.operands(feeds)
    attributes = {} if iterations is None else {"iterations": iterations}
    node = helper.make_node(OPERATOR, names, outputs, domain=DOMAIN, **attributes)
    functions = []
    if body:
        functions.append(build_hyper_connection_function({n: x.shape for n, x in feeds.items()}, node))
        node.overload = functions[0].overload
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in outputs if n]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", values, results)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def open_body(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def compute(how: str, case: Case) -> list[Tensor]:
    """The operator's outputs in float32."""
    operands = {name: value.float() for name, value in case.operands().items()}
    if how == "reference":
        return [x for x in hyper_connection(**operands, iterations=case.iterations) if x is not None]
    feeds = {name: value.numpy() for name, value in operands.items()}
    model = make_model(feeds, how == "body", OUTPUTS if case.beta else OUTPUTS[:-1], case.iterations)
    session = open_body(model) if how == "body" else make_session(model.SerializeToString(), 2)
    return [torch.from_numpy(x) for x in session.run(None, feeds)]


def check(how: str, case: Case) -> None:
    expected, found = case.expected(), compute(how, case)
    assert len(found) == len(expected)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert worst(*((a.double(), b.double()) for a, b in zip(found, expected, strict=True))) < TOLERANCE


@pytest.mark.sample(8)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tokens", [1, 5, 36])
@pytest.mark.parametrize("width", [8, 384])
@pytest.mark.parametrize("streams", [1, 2, 4, 5])
def test_it_is_the_librarys_connection(how: str, streams: int, width: int, tokens: int) -> None:
    check(how, Case(streams, width, tokens))


@pytest.mark.sample(7)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("branch", [False, True], ids=["first", "branch"])
@pytest.mark.parametrize("beta", [False, True], ids=["last", "beta"])
@pytest.mark.parametrize("streams", [1, 3, 4, 7, 16])
def test_without_branch_and_beta(how: str, streams: int, beta: bool, branch: bool) -> None:
    check(how, Case(streams, 40, beta=beta, branch=branch))


@needs_kernel
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("width", [1, 7, 255, 256, 257, 600, 1024])
def test_widths(width: int, streams: int) -> None:
    """About the kernel's strips, of 256."""
    check("kernel", Case(streams, width, 3, batch=1))


@needs_kernel
@pytest.mark.parametrize("target", ["avx512", "avx2", "neon", "plain"])
@pytest.mark.parametrize("streams", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("width", [8, 33, 384])
def test_instruction_sets(target: str, streams: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_CPU_TARGET", target)
    ask = ctypes.CDLL(str(LIBRARY)).titans_onnxruntime_ops_target
    ask.restype = ctypes.c_char_p
    if ask() is None:
        pytest.skip(f"no {target} on this machine")
    for branch in (False, True):
        check("kernel", Case(streams, width, 13, beta=not branch, branch=branch))


@needs_kernel
def test_a_wrong_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {name: x.float().numpy() for name, x in Case(2, 8).operands().items()}
    monkeypatch.setenv("TITANS_CPU_TARGET", "mmx")
    with pytest.raises(Exception, match=r"\[HyperConnection\] not supported on this processor: .*, got mmx\. Fix: set"):
        make_session(make_model(feeds, False, OUTPUTS).SerializeToString())


# A row of logits this far below the others has a sum below the floor of 1e-12.
BELOW_FLOOR = -60.0


@pytest.mark.sample(4)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("iterations", [1, 2, 3, 20])
@pytest.mark.parametrize("streams", [2, 4, 5])
def test_rows_below_the_floor(how: str, streams: int, iterations: int) -> None:
    case = Case(streams, 24, iterations=iterations)
    with torch.no_grad():
        case.connection.static_alpha[0, 1:] += BELOW_FLOOR
        case.connection.static_alpha[1, 1:] -= 20.0 * torch.arange(streams, dtype=torch.float64)
    without_floor = case.operands()["bias"][:, 1 : streams + 1].log_softmax(-2).log_softmax(-1).exp()
    assert without_floor.sum(-1).min() > 0.99
    check(how, case)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("iterations", [1, 20])
def test_logits_beyond_float32(how: str, iterations: int) -> None:
    """Rows of zeros and a one: the library's own float32 is the oracle, as more digits make another answer."""
    case = Case(4, 24, iterations=iterations, dtype=torch.float32)
    with torch.no_grad():
        case.connection.static_alpha[0, 1:] -= 300.0
        case.connection.static_alpha[2, 2] += 300.0
    assert all(x.isfinite().all() for x in compute(how, case))
    check(how, case)


@pytest.mark.sample(4)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-14, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("branch", [False, True], ids=["first", "branch"])
def test_sizes_of_streams(how: str, size: float, branch: bool) -> None:
    """One stream of that size, all of one token, and streams that the branch takes to zero."""
    case = Case(4, 24, branch=branch)
    case.residuals[:, :, 1] *= size
    case.residuals[0, 2] *= size
    if case.given is not None:
        given, weight = case.given
        given[0, 2] *= size
        given[1, 3] = case.residuals[1, 3, 0].float()
        case.residuals[1, 3] = given[1, 3]
        weight[1, 3] = -1.0
    check(how, case)


@pytest.mark.parametrize("how", HOW)
def test_sigmoids_at_their_ends(how: str) -> None:
    case = Case(4, 24)
    with torch.no_grad():
        case.connection.static_alpha[:, 0] = torch.tensor([-1000.0, 1000.0, -90.0, 20.0])
        case.connection.static_beta[:, 0, 0] = torch.tensor([1000.0, -1000.0, 90.0, -20.0])
    check(how, case)


def feeds_of(case: Case) -> Arrays:
    return {name: value.float().numpy() for name, value in case.operands().items()}


@needs_kernel
def test_threads_change_no_bit() -> None:
    feeds = feeds_of(Case(4, 384, 144))
    model = make_model(feeds, False, OUTPUTS).SerializeToString()
    one, *others = (make_session(model, threads).run(None, feeds) for threads in (1, 2, 3))
    assert all(np.array_equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@needs_kernel
def test_a_token_is_the_same_alone() -> None:
    """So that prefill and decoding agree to the last bit."""
    feeds = feeds_of(Case(4, 384, 36, batch=1))
    together = make_session(make_model(feeds, False, OUTPUTS).SerializeToString(), 2).run(None, feeds)
    alone = {n: x[:, 17:18].copy() if n not in ("projection", "bias") else x for n, x in feeds.items()}
    one = make_session(make_model(alone, False, OUTPUTS).SerializeToString(), 2).run(None, alone)
    assert all(np.array_equal(a[:, 17:18], b) for a, b in zip(together, one, strict=True))


@needs_kernel
def test_what_a_node_leaves_out() -> None:
    """iterations is 20, and beta may be computed and not wanted."""
    feeds = feeds_of(Case(3, 16))
    expected = make_session(make_model(feeds, False, OUTPUTS, 20).SerializeToString()).run(None, feeds)
    found = make_session(make_model(feeds, False, OUTPUTS[:-1], None).SerializeToString()).run(None, feeds)
    assert len(found) == 2
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=False))
    default = build_hyper_connection_function(
        {n: x.shape for n, x in feeds.items()}, make_model(feeds, False, OUTPUTS, None).graph.node[0]
    )
    assert default.overload == "b2_t5_s3_d16_i20_branch_beta"


@needs_kernel
def test_no_tokens() -> None:
    feeds = {n: x[:, :0].copy() if n not in ("projection", "bias") else x for n, x in feeds_of(Case(3, 16)).items()}
    result, mixed, beta = make_session(make_model(feeds, False, OUTPUTS).SerializeToString()).run(None, feeds)
    assert (result.shape, mixed.shape, beta.shape) == ((2, 0, 16), (2, 0, 3, 16), (2, 0, 3))


@needs_kernel
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residuals": (2, 5, 48)}, "wrong rank of residuals: expected 4, got 3"),
        ({"residuals": (2, 5, 17, 16)}, "wrong shape of residuals: expected 1 to 16 streams, got 17"),
        ({"residuals": (2, 5, 0, 16)}, "wrong shape of residuals: expected 1 to 16 streams, got 0"),
        ({"residuals": (2, 5, 3, 0)}, "wrong shape of residuals: expected a width of at least 1, got 0"),
        ({"residuals": (2, 5, 3, 15)}, r"wrong shape of projection: expected \(15, 5\), got \(16, 5\)"),
        ({"projection": (16, 5, 1)}, "wrong rank of projection: expected 2, got 3"),
        ({"projection": (16, 3)}, "wrong shape of projection: expected 4 columns, or 5 with beta, got 3"),
        ({"projection": (16, 6)}, "wrong shape of projection: expected 4 columns, or 5 with beta, got 6"),
        ({"projection": (16, 4)}, "wrong shape of projection: expected 5 columns for output beta, got 4"),
        ({"bias": (3, 4)}, r"wrong shape of bias: expected \(3, 5\), got \(3, 4\)"),
        ({"bias": (5,)}, "wrong rank of bias: expected 2, got 1"),
        ({"branch": (2, 5, 3, 16)}, "wrong rank of branch: expected 3, got 4"),
        ({"branch": (2, 4, 16)}, r"wrong shape of branch: expected \(2, 5, 16\), got \(2, 4, 16\)"),
        ({"weight": (2, 5, 4)}, r"wrong shape of weight: expected \(2, 5, 3\), got \(2, 5, 4\)"),
        ({"weight": None}, "missing operand: weight"),
        ({"branch": None}, "missing operand: branch"),
    ],
)
def test_wrong_operands_are_refused(change: dict[str, tuple[int, ...] | None], words: str) -> None:
    feeds = feeds_of(Case(3, 16))
    for name, shape in change.items():
        if shape is None:
            del feeds[name]
    model = make_model(feeds, False, OUTPUTS)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    session = make_session(model.SerializeToString())
    wrong = {name: np.ones(shape, np.float32) for name, shape in change.items() if shape is not None}
    with pytest.raises(Exception, match=rf"\[HyperConnection\] {words}\. Fix: "):
        session.run(None, feeds | wrong)


@needs_kernel
@pytest.mark.parametrize("iterations", [0, -1, 1001])
def test_a_wrong_number_of_iterations_is_refused(iterations: int) -> None:
    model = make_model(feeds_of(Case(3, 16)), False, OUTPUTS, iterations)
    words = rf"\[HyperConnection\] invalid attribute iterations: expected \[1, 1000\], got {iterations}\. Fix: "
    with pytest.raises(Exception, match=words):
        make_session(model.SerializeToString())


@needs_kernel
def test_memory_that_overlaps_is_refused() -> None:
    feeds = feeds_of(Case(3, 16))
    session = make_session(make_model(feeds, False, OUTPUTS).SerializeToString())
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    residuals = feeds["residuals"]
    binding.bind_output("input")
    binding.bind_output("beta")
    binding.bind_output("residuals_out", "cpu", 0, np.float32, residuals.shape, residuals.ctypes.data)
    words = "overlapping buffers: residuals_out and residuals"
    with pytest.raises(Exception, match=rf"\[HyperConnection\] {words}\. Fix: "):
        session.run_with_iobinding(binding)


class Layers(nn.Module):
    """Three connections around branches, as a model has them: the first has no branch before, the last no beta."""

    def __init__(self, streams: int, width: int) -> None:
        super().__init__()
        self.cases = [Case(streams, width, beta=i < 2, seed=i) for i in range(3)]
        operands = [case.operands() for case in self.cases]
        self.projections = nn.ParameterList(entry["projection"].float() for entry in operands)
        self.biases = nn.ParameterList(entry["bias"].float() for entry in operands)

    def forward(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        x, residuals, beta = hyper_connection(residuals, self.projections[0], self.biases[0])
        for projection, bias in zip(self.projections[1:], self.biases[1:], strict=True):
            x, residuals, beta = hyper_connection(residuals, projection, bias, torch.tanh(x), beta)
        return x, residuals

    def expected(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """The same through the library, in float64."""
        first, *others = (case.connection for case in self.cases)
        with torch.no_grad(), patch.object(torch.Tensor, "float", lambda x: x):
            x, residuals, rest = first.width_connection(residuals)
            for connection in others:
                residuals = first.depth_connection(torch.tanh(x), residuals, **rest)
                x, residuals, rest = connection.width_connection(residuals)
        return x, residuals


def export(module: nn.Module, residuals: Tensor) -> onnx.ModelProto:
    """The module with nodes of the operator, each with its function body."""
    model = trace(module, (residuals,), ["residuals"], ["x", "residuals_out"])
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    bodies = {}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            body = build_hyper_connection_function(shapes, node)
            node.overload, bodies[body.overload] = body.overload, body
    model.functions.extend(bodies.values())
    onnx.checker.check_model(model)
    return model


def test_a_module_is_exported_with_a_node_for_each_connection() -> None:
    module, residuals = Layers(4, 32), torch.randn(1, 6, 4, 32)
    model = export(module, residuals)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [(node.op_type, len(node.input), len(node.output)) for node in nodes] == [
        (OPERATOR, 3, 3),
        (OPERATOR, 5, 3),
        (OPERATOR, 5, 2),
    ]
    expected = module.expected(residuals.double())
    feeds = {"residuals": residuals.numpy()}
    sessions = [open_body(model), open_body(inline(model))]
    if LIBRARY.exists():
        sessions.append(make_session(model.SerializeToString()))
    for session in sessions:
        found = [torch.from_numpy(x).double() for x in session.run(None, feeds)]
        assert worst(*zip(found, expected, strict=True)) < TOLERANCE


def test_full_tensorrt_gets_standard_operators() -> None:
    """Its plugin is the memory's alone."""
    residuals = torch.randn(1, 6, 4, 32)
    module = Layers(4, 32)
    model = with_plugin(export(module, residuals), "two-buffers", [])
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {""}
    found = [torch.from_numpy(x).double() for x in open_body(model).run(None, {"residuals": residuals.numpy()})]
    assert worst(*zip(found, module.expected(residuals.double()), strict=True)) < TOLERANCE


@needs_kernel
def test_an_engine_for_the_cpu_keeps_nodes_and_bodies(tmp_path: Path) -> None:
    residuals = torch.randn(1, 6, 4, 32)
    module = Layers(4, 32)
    original = export(module, residuals)
    onnx.save(original, tmp_path / "model.onnx")
    model = optimise(tmp_path / "model.onnx", tmp_path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [OPERATOR] * 3
    assert {node.overload for node in nodes} == {body.overload for body in model.functions}
    for session in (open_body(model), make_session(model.SerializeToString())):
        found = [torch.from_numpy(x).double() for x in session.run(None, {"residuals": residuals.numpy()})]
        assert worst(*zip(found, module.expected(residuals.double()), strict=True)) < TOLERANCE


@needs_kernel
def test_a_session_on_cuda_takes_the_body() -> None:
    """As the runtime opens it, which says so in the session's configuration; computed on the CPU here."""
    feeds = feeds_of(Case(4, 16))
    model = make_model(feeds, True, OUTPUTS)
    model.graph.node[0].attribute[0].i = 1001  # which the kernel refuses
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("titans.cuda", "1")
    options.register_custom_ops_library(str(LIBRARY))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = make_session(make_model(feeds, False, OUTPUTS).SerializeToString()).run(None, feeds)
    for a, b in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    with pytest.raises(Exception, match="attribute iterations"):
        make_session(model.SerializeToString())


def test_tensorrt_rtx_builds_the_body(tmp_path: Path) -> None:
    """Iterations that are written out would take it more memory and time than there is."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    for tokens in (1, 36):
        model = inline(make_model(feeds_of(Case(4, 32, tokens, batch=1)), True, OUTPUTS))
        assert len(model.graph.node) < 50
        built = build_plan(trt, write_graph(model, tmp_path / "graph.onnx"), Settings(capabilities=(89,)))
        assert len(built.plan) < 1 << 22
