"""How many nodes ONNX Runtime runs in the graphs of the example models and of train_mac, with our kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_ops import LIBRARY

from benchmarks.titans_pytorch_model import make_weights
from titans_export.checkpoints import titans, titans_pytorch
from titans_export.checkpoints.checkpoint import LoadOptions
from titans_export.model import StreamModel
from titans_export.onnx.graphs import example_inputs, export_graph

CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "checkpoints"
# A larger number slows every token down: change it only with a reason.
NODES = {("mac-bytes", "decode"): 138, ("recall", "chunk"): 81, ("recall", "decode"): 78}
TRAIN_MAC_DECODE = 364

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the kernels are not built: make setup")


def count_nodes(model: StreamModel, graph: str, folder: Path) -> int:
    """The nodes that a call of this graph runs."""
    [entry] = [entry for entry in model.graphs(1) if entry.name == graph]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        export_graph(model, entry).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"tokens": example_inputs(model, entry.tokens).numpy(), "position": np.zeros(1, np.int64)}
    feeds |= {"learn": np.ones(1, np.bool_), "slots": np.zeros(1, np.int64)}
    feeds |= {state: value.detach().numpy() for state, value in model.initial_state(1).items()}
    session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return sum(e.get("cat") == "Node" and e["name"].endswith("_kernel_time") for e in events)


@pytest.mark.parametrize(("name", "graph"), NODES)
def test_a_call_runs_no_more_nodes(name: str, graph: str, tmp_path: Path) -> None:
    assert count_nodes(titans.load(CHECKPOINTS / name).model, graph, tmp_path) == NODES[name, graph]


@pytest.mark.long
def test_a_token_of_train_mac_runs_no_more_nodes(tmp_path: Path) -> None:
    weights = tmp_path / "train-mac.pt"
    make_weights(weights, "train_mac")
    model = titans_pytorch.load(weights, LoadOptions(config="train_mac")).model
    assert count_nodes(model, "decode", tmp_path) == TRAIN_MAC_DECODE
