"""The schedule of a transformer: which graph reads which rows, and that together they are the library's forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: make setup")

from library_models import double, make_transformer, parallel_forward

from titans_export.checkpoints.titans_pytorch import from_live
from titans_export.exporting import _cuts
from titans_export.model import StreamModel
from titans_export.model.titans_pytorch import transformer
from titans_export.schedule import calls, next_graph

LENGTH = 130
# Segments that are too long for one call of at most 24 rows, and chunks that do or do not divide them.
LONG: dict[str, dict[str, Any]] = {
    "chunks-divide": {"segment_len": 40, "longterm": 2, "chunk": 4, "sliding": True},
    "chunks-do-not": {"segment_len": 33, "longterm": 3, "chunk": 5, "sliding": True},
    "segmented": {"segment_len": 29, "longterm": 0, "chunk": 3, "sliding": False},
}


def make(segment_len: int, longterm: int, chunk: int, sliding: bool) -> torch.nn.Module:
    return make_transformer(
        0,
        "mlp-2",
        {"heads": 2, "dim_head": 8, "qk_rmsnorm": True},
        num_tokens=20,
        dim=16,
        depth=2,
        segment_len=segment_len,
        num_longterm_mem_tokens=longterm,
        num_persist_mem_tokens=2,
        neural_memory_segment_len=chunk,
        neural_mem_weight_residual=True,
        sliding_window_attn=sliding,
        dim_head=8,
        heads=2,
    )


@pytest.mark.parametrize("name", LONG)
def test_parts_of_long_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "MOST_ROWS", 24)
    module = make(**LONG[name])
    model: StreamModel = from_live(module).model.double()
    graphs = model.graphs(4)
    assert "part" in {graph.name for _, graph in calls(graphs, 0, LENGTH)}
    assert {graph.name for graph in graphs} == {graph.name for graph in _ran(graphs)}
    tokens = torch.randint(20, (LENGTH,), generator=torch.Generator().manual_seed(1))
    right = parallel_forward(double(module), tokens)
    for cuts in ([LENGTH], [1] * LENGTH, [7, 2, 50, 1, 70]):
        state, out, at = model.initial_state(1), [], 0
        for count in cuts:
            y, state = model.feed(tokens[None, at : at + count], state, at)
            out.append(y)
            at += count
        # The library computes rotary angles in float32.
        torch.testing.assert_close(torch.cat(out, 1)[0], right, rtol=0, atol=1e-4)


def _ran(graphs: list[Any]) -> list[Any]:
    """What the cuts of an export's comparison run: all of them have to."""
    out, at = [], 0
    for count in _cuts(graphs, LENGTH):
        out += [graph for _, graph in calls(graphs, at, count)]
        at += count
    return out


def test_every_position_has_a_graph_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "MOST_ROWS", 24)
    for options in LONG.values():
        graphs = from_live(make(**options)).model.graphs(4)
        assert all(next_graph(graphs, position, 1).tokens == 1 for position in range(500))
