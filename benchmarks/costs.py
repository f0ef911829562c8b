"""Operations and bytes of a memory, per head and token. All shares of limits are computed from these.

Operations are the multiplications and additions in the chunked form's matmuls. A masked C x C matrix counts in full,
because a matmul computes the full square. Elementwise operations and the coefficients do not count. Bytes assume
float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

FLOAT = 4  # bytes


def _layers(widths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths))


def weights(widths: Sequence[int]) -> int:
    """Number of fast weights per head."""
    return sum(i * o for i, o in _layers(widths))


def update_flop(widths: Sequence[int], chunk: int) -> int:
    """FLOP per token of mode "update".

    They are: forward for k; forward for q through W and through S; the chunk's surprises applied to q; the error
    backward through all layers but the first; and the chunk updates of W and S.
    """
    forward, back = 2 * weights(widths), 2 * (weights(widths) - widths[0] * widths[1])
    within = sum(2 * chunk * (i + o) for i, o in _layers(widths))
    return forward + 2 * forward + within + back + 2 * forward


def read_flop(widths: Sequence[int]) -> int:
    """FLOP per token of mode "read"."""
    return 2 * weights(widths)


def row_bytes(widths: Sequence[int]) -> int:
    """Bytes that the cached form appends per token: each layer's input and error."""
    return FLOAT * sum(i + o for i, o in _layers(widths))


def state_bytes(widths: Sequence[int]) -> int:
    """Bytes of W and S."""
    return 2 * FLOAT * weights(widths)


def decode_bytes(widths: Sequence[int], chunk: int) -> float:
    """Bytes per token of cached decode, averaged over a chunk.

    Each token reads W, S and the open chunk's rows up to its own. The chunk update reads and writes W and S.
    """
    return state_bytes(widths) * (1 + 2 / chunk) + row_bytes(widths) * (chunk + 1) / 2


def live_decode_bytes(widths: Sequence[int]) -> int:
    """Bytes per token of live decode: W and S are read and written."""
    return 2 * state_bytes(widths)


def decode_working_set(widths: Sequence[int], chunk: int) -> int:
    """Bytes that cached decode reuses: W, S and all rows of a chunk."""
    return state_bytes(widths) + chunk * row_bytes(widths)
