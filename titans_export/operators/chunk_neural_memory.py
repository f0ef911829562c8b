"""`ai.titans::ChunkNeuralMemory`: a memory with gates per chunk. docs/chunk-operator.md."""

from .table import INPUTS, MEMORY_DTYPE, NETWORK, OUTPUTS, Attribute, Input, Operator

CHUNK_NEURAL_MEMORY = Operator(
    "ChunkNeuralMemory",
    (
        *INPUTS,
        Input("modulation", optional=True),
        Input("previous", optional=True),
        Input("previous_gate"),  # with `previous`
    ),
    (*OUTPUTS, "initial_weights"),
    (
        *NETWORK,
        *MEMORY_DTYPE,
        Attribute("batch_size", None, label="g"),  # None: chunk_size
        Attribute("loss_scale", 1.0, label="l"),
        Attribute("keys_per_token", 1, label="u"),
        Attribute("lookahead", 0, label="lookahead", flag=True),
        Attribute("norm_weight", "slow"),
        Attribute("momentum_order", 1, label="m"),
        Attribute("grad_clamp", 0.0, label="clamp"),
        Attribute("orthogonalise", 0, label="o"),
    ),
)
