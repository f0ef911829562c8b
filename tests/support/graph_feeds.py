"""One call of a graph of a bundle, from the fresh state, by ONNX's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import inliner
from onnx.reference import ReferenceEvaluator

from titans_export.bundle import Bundle


def feed_of(bundle: Bundle, model: onnx.ModelProto, token: int = 7) -> NDArray[Any]:
    """The logits of one token."""
    state = bundle.initial_state()
    feed = {
        "tokens": np.array([[token]], np.int64),
        "position": np.array([0], np.int64),
        "learn": np.array([True]),
        "slots": np.array([0], np.int64),
        **{entry.input: state[entry.name] for entry in bundle.manifest.state},
    }
    logits: NDArray[Any] = ReferenceEvaluator(inliner.inline_local_functions(model)).run(["logits"], feed)[0]
    return logits
