"""Runs exported Titans models: networks whose memory goes on learning while they run.

    import titans_runtime as rt

    session = rt.Session("model.titans")
    stream = session.stream()
    logits = stream.feed(b"To be, or not to be", logits="last")
    text = bytes(stream.generate(max_tokens=64, temperature=0.8))

It needs numpy and a backend's library (``pip install onnxruntime``), no training framework.
"""

from ._library import Error, lib
from ._session import Session
from ._stream import Stream

__all__ = ["Error", "Session", "Stream", "__version__"]
__version__: str = lib.titans_version().decode()
