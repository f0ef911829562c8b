"""`ai.titans::NeuralMemory`: a memory with gates per token. docs/operator.md."""

from .table import INPUTS, MEMORY_DTYPE, NETWORK, OUTPUTS, Attribute, Operator

NEURAL_MEMORY = Operator("NeuralMemory", INPUTS, OUTPUTS, (Attribute("mode"), *NETWORK, *MEMORY_DTYPE))
MODES = {"update": OUTPUTS, "read": OUTPUTS[:1]}  # outputs by mode
