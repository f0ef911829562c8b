"""Saved streams: reading state files, statistics of their memories, and the comparison of two.

Needs NumPy and titans_runtime only. torch and onnx are imported only to read a bundle's fresh state.
"""

from .comparison import Comparison, FieldDistance, MemoryComparison, compare_states
from .reading import SavedState, memory_arrays, open_state, read_key, write_npz
from .statistics import MemoryInfo, NotFinite, describe_memories, find_not_finite, fresh_memory

__all__ = [
    "Comparison",
    "FieldDistance",
    "MemoryComparison",
    "MemoryInfo",
    "NotFinite",
    "SavedState",
    "compare_states",
    "describe_memories",
    "find_not_finite",
    "fresh_memory",
    "memory_arrays",
    "open_state",
    "read_key",
    "write_npz",
]
