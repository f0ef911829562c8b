"""Benchmarks of one memory layer, of whole models and of a long stream. docs/benchmarks.md explains the results."""
