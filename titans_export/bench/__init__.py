"""Benchmarks: workers, interleaved measurement, statistics and a description of the machine."""

KINDS = ("prefill", "decode")  # the two measurements of a model
