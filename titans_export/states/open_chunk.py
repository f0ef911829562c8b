"""The open chunk in a saved packed row, by operator: which of its rows count, and what they would change W by."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def used_rows(operator: str | None, row: Mapping[str, Floats]) -> NDArray[np.bool_] | None:
    """Which rows of the open chunk the stream will read, (heads, C); None for an operator that does not say.

    row: the fields by name, each (heads, *shape).
    """
    if operator != "NeuralMemory":
        return None
    used: NDArray[np.bool_] = (row["e"] != 0) | (row["a"] != 0)
    return used


def open_chunk_change(operator: str | None, row: Mapping[str, Floats]) -> NDArray[np.float64] | None:
    """||W' - W|| of each head, (heads,), float64; None for an operator whose weights wait for the chunk's last token.

    W' = beta W + f S - sum_s a_s g_s, g_s = layer_input_s^T output_grad_s (docs/operator.md). row: as in `used_rows`.
    """
    used = used_rows(operator, row)
    if used is None:
        return None
    a, f, beta = (row[name].astype(np.float64) for name in ("a", "f", "beta"))
    squares = np.zeros(len(beta))
    layer = 0
    while f"W{layer}" in row:
        before = row[f"W{layer}"].astype(np.float64)
        now, surprise = (_with_error(row, f"{letter}{layer}") for letter in "WS")
        rows = (
            np.where(used[..., None], row[f"{side}{layer}"], 0).astype(np.float64)
            for side in ("layer_input", "output_grad")
        )
        after = beta[:, None, None] * now + f[:, None, None] * surprise - np.einsum("hs,hsr,hsc->hrc", a, *rows)
        # Between chunks nothing is updated, so kept errors stay where they are.
        idle = (a == 0).all(1) & (beta == 1) & (f == 0)
        squares += np.where(idle, 0.0, np.square(after - before).sum((1, 2)))
        layer += 1
    norms: NDArray[np.float64] = np.sqrt(squares)
    return norms


def _with_error(row: Mapping[str, Floats], name: str) -> NDArray[np.float64]:
    """A matrix of each head with its kept rounding error, (heads, rows, columns)."""
    values = row[name].astype(np.float64)
    error = row.get(f"E{name}")
    return values if error is None else values + error
