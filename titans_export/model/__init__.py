"""The mathematics of Titans in PyTorch: the memory, attention, and one file per variant."""

from .config import MemoryConfig, ModelConfig, parse_config, read_config
from .layers import Step
from .memory import MemorySpec
from .model import Titans

__all__ = ["MemoryConfig", "MemorySpec", "ModelConfig", "Step", "Titans", "parse_config", "read_config"]
