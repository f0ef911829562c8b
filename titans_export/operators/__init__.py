"""Tables of the memory operators' contracts: inputs, outputs and attributes. Imports neither PyTorch nor ONNX.

docs/operator.md and docs/chunk-operator.md define the entries.
"""

from .chunk_neural_memory import CHUNK_NEURAL_MEMORY
from .neural_memory import NEURAL_MEMORY
from .table import DOMAIN, VERSION, Attribute, Input, Operator

MEMORY_OPERATORS = {operator.name: operator for operator in (NEURAL_MEMORY, CHUNK_NEURAL_MEMORY)}

__all__ = [
    "CHUNK_NEURAL_MEMORY",
    "DOMAIN",
    "MEMORY_OPERATORS",
    "NEURAL_MEMORY",
    "VERSION",
    "Attribute",
    "Input",
    "Operator",
]
