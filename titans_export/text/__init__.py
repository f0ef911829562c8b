"""Text and tokens: reading in constant memory, decoding token by token."""
