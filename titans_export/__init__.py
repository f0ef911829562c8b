"""Exports trained Titans models, and quantises, compiles and verifies them."""

import os

from .api import build, export, quantize, verify

__all__ = ["__version__", "build", "export", "quantize", "verify"]
__version__ = "0.1.0"

# ONNX Runtime from 1.32 on writes a device id below $HOME and sends events, unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
