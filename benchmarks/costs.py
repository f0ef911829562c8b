"""What a memory has to compute and to move, per head and token: the one place that all shares of limits come from.

Operations are the multiplications and additions of the chunked form's matrix products; what is elementwise and what
makes the coefficients is not counted, and a masked C x C counts as the full square that a matrix product computes.
Bytes are those of float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

FLOAT = 4  # bytes


def _layers(widths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths))


def weights(widths: Sequence[int]) -> int:
    """Fast weights of one head."""
    return sum(i * o for i, o in _layers(widths))


def update_flop(widths: Sequence[int], chunk: int) -> int:
    """A token of mode "update": forward for k; forward for q through W and through S; the chunk's surprises seen by q;
    the error back through all layers but the first; and the chunk updates of W and S.
    """
    forward, back = 2 * weights(widths), 2 * (weights(widths) - widths[0] * widths[1])
    within = sum(2 * chunk * (i + o) for i, o in _layers(widths))
    return forward + 2 * forward + within + back + 2 * forward


def read_flop(widths: Sequence[int]) -> int:
    """A token of mode "read"."""
    return 2 * weights(widths)


def row_bytes(widths: Sequence[int]) -> int:
    """What the cached form appends for a token: each layer's input and its error."""
    return FLOAT * sum(i + o for i, o in _layers(widths))


def state_bytes(widths: Sequence[int]) -> int:
    """W and S."""
    return 2 * FLOAT * weights(widths)


def decode_bytes(widths: Sequence[int], chunk: int) -> float:
    """A token of cached decode, on average over a chunk: W and S are read, and the open chunk's rows up to the token's
    own; the chunk update reads and writes W and S.
    """
    return state_bytes(widths) * (1 + 2 / chunk) + row_bytes(widths) * (chunk + 1) / 2


def live_decode_bytes(widths: Sequence[int]) -> int:
    """A token of live decode: W and S read and written."""
    return 2 * state_bytes(widths)


def decode_working_set(widths: Sequence[int], chunk: int) -> int:
    """What cached decode comes back to: W, S and all rows of a chunk."""
    return state_bytes(widths) + chunk * row_bytes(widths)
