"""Tables of the operators' contracts: inputs, outputs and attributes. Imports neither PyTorch nor ONNX.

docs/operator.md, docs/chunk-operator.md and docs/hyper-connection.md define the entries.
"""

from .chunk_neural_memory import CHUNK_NEURAL_MEMORY
from .hyper_connection import HYPER_CONNECTION
from .neural_memory import NEURAL_MEMORY
from .table import DOMAIN, VERSION, Attribute, Input, Operator

MEMORY_OPERATORS = {operator.name: operator for operator in (NEURAL_MEMORY, CHUNK_NEURAL_MEMORY)}
OPERATORS = {**MEMORY_OPERATORS, HYPER_CONNECTION.name: HYPER_CONNECTION}

__all__ = [
    "CHUNK_NEURAL_MEMORY",
    "DOMAIN",
    "HYPER_CONNECTION",
    "MEMORY_OPERATORS",
    "NEURAL_MEMORY",
    "OPERATORS",
    "VERSION",
    "Attribute",
    "Input",
    "Operator",
]
