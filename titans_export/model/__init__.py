"""Titans models in PyTorch: the memory, attention, and one file per variant. Models of other libraries have packages of
their own. stream.py defines the interface that export needs.
"""

from .config import MemoryConfig, ModelConfig, parse_config, read_config
from .layers import Step
from .memory import MemorySpec
from .model import Titans
from .stream import Call, Graph, StreamModel, TensorSpec

__all__ = [
    "Call",
    "Graph",
    "MemoryConfig",
    "MemorySpec",
    "ModelConfig",
    "Step",
    "StreamModel",
    "TensorSpec",
    "Titans",
    "parse_config",
    "read_config",
]
