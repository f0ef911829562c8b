"""The reference answer: equations 12 to 15 token by token in float64 NumPy, independent of the project's code.

Every baseline's answer is compared with it before timing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .case import Case

Answer = Mapping[str, NDArray[np.floating]]

# Relative to the largest value of the same output. Reordering some hundred float32 sums changes at most 2e-6; a wrong
# coefficient or lower precision exceeds 1e-3.
TOLERANCE = 1e-5


def _silu(z: NDArray[np.float64]) -> NDArray[np.float64]:
    y: NDArray[np.float64] = z / (1 + np.exp(-z))
    return y


def _silu_derivative(z: NDArray[np.float64]) -> NDArray[np.float64]:
    s = 1 / (1 + np.exp(-z))
    return s * (1 + z * (1 - s))


def _network(weights: list[NDArray[np.float64]], x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Pre-activations of each layer. weights: (N, in, out); x: (N, in)."""
    outputs: list[NDArray[np.float64]] = []
    for i, w in enumerate(weights):
        x = _silu(outputs[-1]) if i else x
        outputs.append(np.einsum("ni,nio->no", x, w))
    return outputs


def _gradient(
    weights: list[NDArray[np.float64]], k: NDArray[np.float64], v: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """d || M_W(k) - v ||^2 / dW for each layer, (N, in, out)."""
    outputs = _network(weights, k)
    d, found = 2 * (outputs[-1] - v), []
    for i in reversed(range(len(weights))):
        x = _silu(outputs[i - 1]) if i else k
        found.append(x[:, :, None] * d[:, None, :])
        if i:
            d = np.einsum("no,nio->ni", d, weights[i]) * _silu_derivative(outputs[i - 1])
    return found[::-1]


def recurrence(case: Case) -> dict[str, NDArray[np.float64]]:
    """y and, for kind "mac", read: (B, H, T, D); final W0, W1, ... and S0, S1, ...: (B, H, in, out)."""
    data, lead = case.data, (case.streams, case.heads)
    count = case.streams * case.heads

    def flat(x: NDArray[np.float32]) -> NDArray[np.float64]:
        return x.reshape(count, *x.shape[2:]).astype(np.float64)

    q, k, v, context = (flat(x) for x in (data.q, data.k, data.v, data.context))
    theta, eta, alpha = (flat(x)[..., None, None] for x in (data.step_size, data.momentum, data.forget_gate))
    w = [flat(x) for x in data.weights]
    s = [np.zeros_like(x) for x in w]
    y, read, start = np.empty_like(q), np.empty_like(q), w
    for t in range(case.tokens):
        if t % case.chunk == 0:
            start = w
        read[:, t] = _network(start, context[:, t])[-1]
        gradient = _gradient(start, k[:, t], v[:, t])
        s = [eta[:, t] * a - theta[:, t] * g for a, g in zip(s, gradient, strict=True)]
        w = [(1 - alpha[:, t]) * a + b for a, b in zip(w, s, strict=True)]
        y[:, t] = _network(w, q[:, t])[-1]
    found = {"y": y, **{f"W{i}": x for i, x in enumerate(w)}, **{f"S{i}": x for i, x in enumerate(s)}}
    if case.kind == "mac":
        found["read"] = read
    return {name: x.reshape(*lead, *x.shape[1:]) for name, x in found.items()}


def errors(answer: Answer, right: Answer) -> dict[str, float]:
    """By output, the largest error relative to the largest reference value; infinite for missing or non-finite
    outputs.
    """
    found = {}
    for name, expected in right.items():
        got = answer.get(name)
        if got is None or got.shape != expected.shape:
            found[name] = float("inf")
            continue
        distance = float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())
        found[name] = distance if np.isfinite(distance) else float("inf")
    return found
