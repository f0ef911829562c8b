"""Measuring side by side: workers that take turns, statistics of what they took, and the machine they ran on."""

KINDS = ("prefill", "decode")  # what is measured of a model
