"""Runs exported Titans models, whose memory learns at inference.

    import titans_runtime as rt

    session = rt.Session("model.titans")
    stream = session.stream()
    logits = stream.feed(b"To be, or not to be", outputs="last")
    text = bytes(stream.generate(max_tokens=64, temperature=0.8))

It needs numpy and a backend library (``pip install onnxruntime``), no training framework.
"""

from ._batch import BatchError
from ._guard import GuardReport, Health
from ._library import Error, lib
from ._log import send_to_logging
from ._metrics import Durations, Metrics
from ._session import Session
from ._state import State, read_state
from ._stream import Stream

__all__ = [
    "BatchError",
    "Durations",
    "Error",
    "GuardReport",
    "Health",
    "Metrics",
    "Session",
    "State",
    "Stream",
    "__version__",
    "read_state",
]
__version__: str = lib.titans_version().decode()
send_to_logging()
