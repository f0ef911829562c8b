"""The memory's mathematics: gradients against autograd, and the three forms against the paper's recurrence."""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE_FLOAT64, Case, kinds, worst
from oracles import network, titans_stream

from titans_export.model.memory import (
    Gates,
    MemorySpec,
    State,
    chunked,
    coefficients,
    recurrence,
    surprise,
)


@kinds
def test_inner_gradient_equals_autograd(spec: MemorySpec) -> None:
    case = Case(spec, length=1, streams=4)
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            leaves = [w[b, h].clone().requires_grad_() for w in case.weights]
            loss = (network(spec, leaves, case.k[b, h], scale) - case.v[b, h]).square().sum()
            expected = torch.autograd.grad(loss, leaves)
            got = surprise(spec, [w[b, h] for w in case.weights], case.k[b, h], case.v[b, h], scale)
            outer = [x.T @ d for x, d in zip(got.layer_input, got.output_grad, strict=True)]
            assert worst(*zip(outer, expected, strict=True)) < TOLERANCE_FLOAT64
            assert torch.allclose(got.loss[0], loss.detach(), rtol=1e-12, atol=0)


@kinds
@pytest.mark.parametrize("edges", [False, True], ids=["gates-inside", "gates-0-and-1"])
@pytest.mark.parametrize("length", [1, 7, 8, 27, 40])
def test_forms_equal_the_recurrence_with_autograd(spec: MemorySpec, length: int, edges: bool) -> None:
    case = Case(spec, length, edges=edges, seed=length)
    state = State(case.weights, [torch.zeros_like(w) for w in case.weights])
    gates = Gates(*case.gates)
    y_tokens, tokens = recurrence(spec, state, case.q, case.k, case.v, gates, case.norm_scale)
    y_chunks, chunks, losses = chunked(spec, state, case.q, case.k, case.v, gates, case.norm_scale)
    for b in range(case.streams):
        for h in range(case.heads):
            scale = None if case.norm_scale is None else case.norm_scale[h]
            inputs = [x[b, h] for x in (case.q, case.k, case.v, *case.gates)]
            y, w, s, loss = titans_stream(spec, [x[b, h] for x in case.weights], *inputs, norm_scale=scale)
            assert worst((y_tokens[b, h], y), (y_chunks[b, h], y)) < TOLERANCE_FLOAT64
            for form in (tokens, chunks):
                got = [x[b, h] for x in (*form.w, *form.s)]
                assert max(float((a - e).abs().max()) for a, e in zip(got, (*w, *s), strict=True)) < TOLERANCE_FLOAT64
            assert worst((losses[b, h], loss)) < TOLERANCE_FLOAT64


def test_coefficients_equal_their_definition() -> None:
    case = Case(MemorySpec((6, 6), chunk_size=8), length=8, edges=True)
    c = coefficients(Gates(*case.gates))
    theta, eta, keep = case.step_size, case.momentum, 1 - case.forget_gate
    for t in range(8):
        for s in range(8):
            e = eta[..., s + 1 : t + 1].prod(-1) * theta[..., s] if s <= t else torch.zeros_like(theta[..., 0])
            a = sum(
                (keep[..., u + 1 : t + 1].prod(-1) * eta[..., s + 1 : u + 1].prod(-1) for u in range(s, t + 1)),
                torch.zeros_like(theta[..., 0]),
            )
            assert torch.allclose(c.e[..., t, s], e, atol=1e-14)
            assert torch.allclose(c.a[..., t, s], a * theta[..., s], atol=1e-14)
        assert torch.allclose(c.m[..., t], eta[..., : t + 1].prod(-1), atol=1e-14)
        assert torch.allclose(c.beta[..., t], keep[..., : t + 1].prod(-1), atol=1e-14)
        f = sum(keep[..., u + 1 : t + 1].prod(-1) * eta[..., : u + 1].prod(-1) for u in range(t + 1))
        assert torch.allclose(c.f[..., t], f, atol=1e-14)


@kinds
def test_training_gradients_flow_through_the_chunked_form(spec: MemorySpec) -> None:
    """d(sum y) of the chunked form with respect to weights, keys and every gate, against the recurrence with a graph of
    autograd gradients inside autograd."""
    case = Case(spec, length=11, streams=1, heads=1, edges=False)
    leaves = [x[0, 0].clone().requires_grad_() for x in (case.q, case.k, case.v, *case.gates)]
    weights = [w[0, 0].clone().requires_grad_() for w in case.weights]
    scale = None if case.norm_scale is None else case.norm_scale[0]
    q, k, v, theta, eta, alpha = leaves
    zeros = [torch.zeros_like(w) for w in weights]
    got = torch.autograd.grad(
        chunked(spec, State(weights, zeros), q, k, v, Gates(theta, eta, alpha), scale)[0].square().sum(),
        leaves + weights,
    )
    w, s, origin, total = list(weights), zeros, list(weights), torch.zeros((), dtype=torch.float64)
    for t in range(len(q)):
        if t % spec.chunk_size == 0:
            origin = w
        loss = (network(spec, origin, k[t : t + 1], scale) - v[t : t + 1]).square().sum()
        gradient = torch.autograd.grad(loss, origin, create_graph=True)
        s = [eta[t] * a - theta[t] * g for a, g in zip(s, gradient, strict=True)]
        w = [(1 - alpha[t]) * a + b for a, b in zip(w, s, strict=True)]
        total = total + network(spec, w, q[t : t + 1], scale).square().sum()
    expected = torch.autograd.grad(total, leaves + weights)
    assert worst(*zip(got, expected, strict=True)) < TOLERANCE_FLOAT64
