"""The mathematics of Titans in PyTorch: the memory, attention, and one file per variant; models of other libraries in
packages of their own. What export needs of any of them is in stream.py.
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
