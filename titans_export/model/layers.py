"""Layers that all variants share. Weights are (in, out) and y = x W, so exported graphs need no transposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_convolution import causal_convolution

NORM_EPS = 1e-6

StreamState = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Position of each stream in a call.

    position: (B,) int64, tokens consumed before this call. learn: (B,) bool. aligned: the call holds whole chunks from
    a chunk's start; otherwise it holds a single token. slots: (B,) int64, the row of each stream in the state's pools;
    None if stream b has row b.
    """

    position: Tensor
    learn: Tensor | None
    aligned: bool
    slots: Tensor | None = None


class Linear(nn.Module):
    """y = x W + b. x: (..., size_in)."""

    def __init__(self, size_in: int, size_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        nn.init.uniform_(self.weight, -(size_in**-0.5), size_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def flat(x: Tensor) -> Tensor:
    """(..., D) to (N, D). ONNX Runtime runs a 2-D matmul with bias as one node, and adds two Reshapes to a 3-D one."""
    return x.reshape(-1, x.shape[-1])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. The weight has `shape`: (D,), or (heads, D) for x of (B, heads, T,
    D).
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return _rms_norm(x, NORM_EPS, self.weight)
        size = x.shape[-1]
        # The norm node takes a constant scale, and the per-head weight multiplies its output. The constant must not be
        # 1, because the optimiser would remove a multiplication by 1.
        scale = x.new_full((size,), size**-0.5)
        y: Tensor = _rms_norm(x, NORM_EPS, scale) * (self.weight * size**0.5).unsqueeze(-2)
        return y


def _rms_norm(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    """x / rms(x) * weight, weight (D,), in a form that ONNX Runtime fuses into one node."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def unit(x: Tensor) -> Tensor:
    """l2 normalisation of the last dimension (section 4.4): x / sqrt(sum x^2 + epsilon)."""
    size = x.shape[-1]
    return _rms_norm(x, NORM_EPS / size, x.new_full((size,), size**-0.5))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) to (B, heads, T, D). A single token needs no transpose, so decode graphs have none."""
    batch, length, width = x.shape
    if length == 1:
        return x.reshape(batch, heads, 1, width // heads)
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D) to (B, T, heads * D)."""
    batch, heads, length, width = x.shape
    if length > 1:
        x = x.transpose(1, 2)
    return x.reshape(batch, length, heads * width)


class CausalConv(nn.Module):
    """Depthwise causal convolution over tokens (section 4.4). Its state is the last width - 1 inputs.

    activation: "none" or "silu", applied to the output.
    """

    def __init__(self, channels: int, width: int, activation: str = "none") -> None:
        super().__init__()
        self.width, self.activation = width, activation
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-(width**-0.5), width**-0.5))

    def initial_state(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.width - 1, self.weight.shape[1])

    def forward(self, x: Tensor, past: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, channels); past: (P, width - 1, channels), a pool with a row per slot. Returns the output and the
        next pool.
        """
        return causal_convolution(past, x, self.weight, slots=slots, activation=self.activation)


class FeedForward(nn.Module):
    """Gated network (SwiGLU): (silu(x A) * x B) C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y
