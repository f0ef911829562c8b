"""Tables of the operators' contracts: inputs, outputs and attributes. Imports neither PyTorch nor ONNX.

docs/operator.md, docs/chunk-operator.md, docs/attention-operator.md, docs/convolution-operator.md and
docs/hyper-connection.md define the entries.
"""

from .cached_attention import CACHED_ATTENTION
from .causal_convolution import CAUSAL_CONVOLUTION
from .chunk_neural_memory import CHUNK_NEURAL_MEMORY
from .hyper_connection import HYPER_CONNECTION
from .neural_memory import NEURAL_MEMORY
from .table import DOMAIN, VERSION, Attribute, Input, Operator

MEMORY_OPERATORS = {operator.name: operator for operator in (NEURAL_MEMORY, CHUNK_NEURAL_MEMORY)}
CACHE_OPERATORS = {operator.name: operator for operator in (CACHED_ATTENTION, CAUSAL_CONVOLUTION)}
OPERATORS = {**MEMORY_OPERATORS, **CACHE_OPERATORS, HYPER_CONNECTION.name: HYPER_CONNECTION}

__all__ = [
    "CACHED_ATTENTION",
    "CACHE_OPERATORS",
    "CAUSAL_CONVOLUTION",
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
