"""The project's benchmarks: one memory layer, whole models, a long stream. docs/benchmarks.md says how to read them."""
