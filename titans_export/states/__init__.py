"""What a saved stream holds: reading state files, numbers about their memories, and how far two of them are apart.

NumPy and titans_runtime are enough; neither torch nor onnx is imported but to read a bundle's fresh state.
"""

from .comparison import Comparison, FieldDistance, MemoryComparison, compare_states
from .reading import SavedState, memory_arrays, open_state, read_key, write_npz
from .statistics import MemoryFacts, NotFinite, describe_memories, find_not_finite, fresh_memory

__all__ = [
    "Comparison",
    "FieldDistance",
    "MemoryComparison",
    "MemoryFacts",
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
